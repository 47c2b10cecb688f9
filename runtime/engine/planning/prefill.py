"""The prompts that prefill: in which order, cut into which pieces, and which of them share a run."""

from collections.abc import Collection, Iterator

import numpy as np

from runtime.engine.admission import priority_of
from runtime.engine.kv_slots import KvSlots
from runtime.engine.planning.run import MAX_PLACES, Run
from runtime.engine.sequence import LiveSequence
from runtime.session.session import Batch, SessionInfo


class PrefillPlanner:
    """The sequences in slots whose prompts are not in the cache yet. `sequences` are in order of admission."""

    def __init__(self, info: SessionInfo, slots: KvSlots, *, prefill_chunk: int) -> None:
        self.sequences: list[LiveSequence] = []
        self._slots = slots
        self._prefill_chunk = prefill_chunk
        self._is_oldest_turn = False
        self._is_ragged, self._is_sparse = info.is_ragged, info.is_sparse
        self._max_scored = info.capacity if info.max_scored is None else info.max_scored

    def plan(self, unfinished: Collection[LiveSequence]) -> Iterator[Run]:
        """The runs of a step, all but for `unfinished` ones. Advance `past_len` by each before taking the next."""
        budget = self._prefill_chunk
        pending = [sequence for sequence in self._in_order() if sequence not in unfinished]
        while pending and self._piece(pending[0]) <= budget:
            rows = self._share_run(pending, budget)
            run = self._run_of(rows)
            budget -= run.num_prefill_tokens
            pending = [s for s in pending if s not in rows]
            yield run

    def advance(self, run: Run) -> None:
        """Note that the tokens of a run are in the cache."""
        batch = run.batch
        self._slots.past_len[batch.first_slot : batch.first_slot + len(batch.query_len)] += batch.query_len

    def _in_order(self) -> list[LiveSequence]:
        """Prompts in the order in which they run: by priority, then by turns the oldest or the shortest rest first. So
        a short prompt waits for one chunk of a long one, and a long one gets a chunk every other step."""
        self._is_oldest_turn = not self._is_oldest_turn
        if self._is_oldest_turn:
            return sorted(self.sequences, key=priority_of)
        return sorted(self.sequences, key=lambda s: (priority_of(s), self._left(s)))

    def _share_run(self, pending: list[LiveSequence], budget: int) -> list[LiveSequence]:
        """The first pending sequence, and those that fit in its run, by slot; neighbours alone, unless the session is
        sparse."""
        rows = [pending[0]]
        if self._is_sparse:
            for sequence in pending[1:]:
                if self._fits([*rows, sequence], budget):
                    rows.append(sequence)
            return sorted(rows, key=lambda s: s.slot or 0)
        if not self._is_ragged:
            return rows
        by_slot = {s.slot: s for s in pending}
        assert pending[0].slot is not None
        for direction in (1, -1):
            slot = pending[0].slot + direction
            while slot in by_slot and self._fits([*rows, by_slot[slot]], budget):
                rows.append(by_slot[slot])
                slot += direction
        return sorted(rows, key=lambda s: s.slot or 0)

    def _fits(self, rows: list[LiveSequence], budget: int) -> bool:
        """Whether the next pieces of these prompts may go in one run."""
        lens = [self._piece(s) for s in rows]
        width = max(lens)
        if min(lens) == 1 < width:
            return False  # another kernel, see `_piece`
        if width > self._max_scored and any(s.wants_prompt_logits for s in rows):
            return False
        if sum(lens) > budget or self._is_sparse:
            return sum(lens) <= budget
        ends = [self._slots.past_len[s.slot] + width for s in rows]
        return len(rows) * width <= MAX_PLACES * budget and bool(max(ends) <= self._slots.capacity)

    def _left(self, sequence: LiveSequence) -> int:
        """Prompt tokens not yet in the cache."""
        return sequence.num_prompt - int(self._slots.past_len[sequence.slot])

    def _piece(self, sequence: LiveSequence) -> int:
        """Tokens of its next chunk; never a single one of a longer prompt. A run of one token takes another attention
        kernel than longer runs, whose sums do not depend on where the prompt is cut. So a request gets the same tokens
        alone and in a batch, with its beginning computed or cached."""
        left = self._left(sequence)
        chunk = min(self._prefill_chunk, self._max_scored) if sequence.wants_prompt_logits else self._prefill_chunk
        if left == chunk + 1 > 2:
            return chunk - 1
        return min(left, chunk)

    def _run_of(self, rows: list[LiveSequence]) -> Run:
        """A run of the next pieces of these prompts, ordered by slot. Slots between them are idle."""
        first_slot, last_slot = rows[0].slot, rows[-1].slot
        assert first_slot is not None and last_slot is not None
        lens = [self._piece(s) for s in rows]
        width, span = max(lens), last_slot - first_slot + 1
        token_ids = np.zeros((span, width), np.int64)
        past_len, query_len = np.zeros(span, np.int32), np.zeros(span, np.int32)
        wanted, scored, done = [], [], []
        for sequence, num in zip(rows, lens, strict=True):
            assert sequence.slot is not None
            row, past = sequence.slot - first_slot, int(self._slots.past_len[sequence.slot])
            token_ids[row, :num] = sequence.request.prompt_ids[past : past + num]
            past_len[row], query_len[row] = past, num
            if past + num == sequence.num_prompt:
                wanted.append(row * width + num - 1)
                done.append(sequence)
        for sequence, num in zip(rows, lens, strict=True):
            if sequence.wants_prompt_logits:
                assert sequence.slot is not None
                num_scored = num - (sequence in done)  # the token after the last one is not in the prompt
                scored.append((sequence, num_scored))
                start = (sequence.slot - first_slot) * width
                wanted.extend(range(start, start + num_scored))
        # A run must be asked for at least one row of logits; a chunk in mid-prompt asks for its last and
        # ignores it.
        wanted = wanted or [lens[0] - 1]
        batch = Batch(first_slot, token_ids, past_len, query_len, np.array(wanted, np.int64))
        return Run(batch, done, num_prefill_tokens=sum(lens), prefilled=tuple(rows), scored=tuple(scored))
