"""Which sequences run in the next step, and in which slots.

Two queues: waiting (first in, first out) and, by slot, those that prefill or decode. A step is

    admit      waiting -> lowest free slots
    compact    decoding rows move down into free slots, so that they stay a tight span
    plan       one decode run over slots [0, highest decoding + 1), then prefill runs of at most
    `prefill_chunk` tokens

so a long prompt never holds up the streams that run, and they never hold up the prompt. Knows nothing about
sampling, text or threads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from runtime.kv_slots import KvSlots
from runtime.sequence import Sequence
from runtime.session import Batch, SessionInfo

MIN_FILL = 0.75
"""Prompts share a run only if at least this part of it is not padding. A padded token costs as much as a real
one, so padding adds at most a third to the work, against one more pass over the weights for each prompt run
by itself."""


class Run(NamedTuple):
    """One call of the session: row i of its logits belongs to `sequences[i]`. The rows behind those belong to the
    prompts in `scored`, so many to each; further rows are ignored."""

    batch: Batch
    sequences: list[Sequence]
    num_decode: int = 0
    num_prefill_tokens: int = 0
    scored: tuple[tuple[Sequence, int], ...] = ()


class Scheduler:
    """Owns the slots and the queues. `copy_slot(source, target, num_tokens)` is the session's."""

    def __init__(self, info: SessionInfo, copy_slot: Callable[[int, int, int], None], *, prefill_chunk: int) -> None:
        self.slots = KvSlots(info.num_slots, info.capacity)
        self.waiting: deque[Sequence] = deque()
        self._copy_slot = copy_slot
        self._prefill_chunk = prefill_chunk
        self._is_ragged = info.is_ragged
        self._prefilling: list[Sequence] = []  # in order of admission
        self._decoding: list[Sequence | None] = [None] * info.num_slots
        # What the next decode run reads, by slot; the batches below are views of these.
        self._next_ids = np.zeros((info.num_slots, 1), np.int64)
        self._is_decoding = np.zeros(info.num_slots, np.int32)
        self._decode_run: Run | None = None  # kept until a row joins, leaves or moves

    @property
    def num_running(self) -> int:
        return self.slots.num_used

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.slots.num_used > 0

    def plan(self) -> Iterator[Run]:
        """The runs of one step, each made when the one before has been advanced."""
        self._admit()
        self._compact()
        if (run := self._plan_decode()) is not None:
            yield run
        budget = self._prefill_chunk
        pending = list(self._prefilling)
        while pending and self._piece(pending[0]) <= budget:
            rows = self._share_run(pending, budget)
            run = self._plan_prefill(rows)
            budget -= run.batch.token_ids.size
            pending = [s for s in pending if s not in rows]
            yield run

    def advance(self, run: Run) -> None:
        """Note that a run is done: its tokens are in the cache, and finished prompts decode from now on."""
        batch = run.batch
        if run.num_decode:
            span = len(batch.past_len)
            self.slots.past_len[:span] += self._is_decoding[:span]
            return
        self.slots.past_len[batch.first_slot : batch.first_slot + len(batch.query_len)] += batch.query_len
        for sequence in run.sequences:
            assert sequence.slot is not None
            self._prefilling.remove(sequence)
            self._decoding[sequence.slot] = sequence
            self._is_decoding[sequence.slot] = 1
            self._decode_run = None

    def set_next(self, sequence: Sequence, token_id: int) -> None:
        """The token that a sequence runs through the model next."""
        self._next_ids[sequence.slot, 0] = token_id

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is; its slot is free at once."""
        slot = sequence.slot
        if slot is None:
            self.waiting.remove(sequence)
            return
        if self._decoding[slot] is sequence:
            self._clear_row(slot)
        else:
            self._prefilling.remove(sequence)
        self.slots.release(slot)
        sequence.slot = None

    def _admit(self) -> None:
        while self.waiting and self.slots.num_free:
            sequence = self.waiting.popleft()
            sequence.slot = self.slots.take()
            self._next_ids[sequence.slot, 0] = 0
            self._prefilling.append(sequence)

    def _compact(self) -> None:
        """Move the highest decoding rows into free slots below; after admission, nobody else wants them."""
        while (target := self.slots.lowest_free) is not None:
            source = self._span() - 1
            if source < target:
                return
            sequence = self._decoding[source]
            assert sequence is not None
            num_tokens = int(self.slots.past_len[source])
            self._copy_slot(source, target, num_tokens)
            self.slots.take()
            self.slots.past_len[target] = num_tokens
            self._decoding[target], self._is_decoding[target] = sequence, 1
            self._next_ids[target] = self._next_ids[source]
            sequence.slot = target
            self._clear_row(source)
            self.slots.release(source)

    def _clear_row(self, slot: int) -> None:
        self._decoding[slot] = None
        self._is_decoding[slot] = 0
        self._next_ids[slot, 0] = 0
        self._decode_run = None

    def _span(self) -> int:
        """One more than the highest decoding slot."""
        rows = np.flatnonzero(self._is_decoding)
        return int(rows[-1]) + 1 if len(rows) else 0

    def _plan_decode(self) -> Run | None:
        span = self._span()
        if self._decode_run is None and span:
            rows = np.flatnonzero(self._is_decoding)
            # A session that is not ragged runs every row: those that do not decode write one garbage token
            # behind their valid ones, where the next chunk overwrites it.
            query_len = self._is_decoding[:span] if self._is_ragged else np.ones(span, np.int32)
            batch = Batch(0, self._next_ids[:span], self.slots.past_len[:span], query_len, rows.astype(np.int64))
            sequences = [s for s in self._decoding[:span] if s is not None]
            self._decode_run = Run(batch, sequences, num_decode=len(sequences))
        return self._decode_run

    def _share_run(self, pending: list[Sequence], budget: int) -> list[Sequence]:
        """The first pending sequence, and neighbours that fit in its run with little padding, by slot."""
        rows = [pending[0]]
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

    def _fits(self, rows: list[Sequence], budget: int) -> bool:
        """Whether the next pieces of these prompts may go in one run."""
        lens = [self._piece(s) for s in rows]
        padded, width = len(rows) * max(lens), max(lens)
        ends = [self.slots.past_len[s.slot] + width for s in rows]
        return padded <= budget and sum(lens) >= MIN_FILL * padded and bool(max(ends) <= self.slots.capacity)

    def _left(self, sequence: Sequence) -> int:
        """Prompt tokens not yet in the cache."""
        return sequence.num_prompt - int(self.slots.past_len[sequence.slot])

    def _piece(self, sequence: Sequence) -> int:
        """Tokens of its next chunk. A prompt is cut at multiples of `prefill_chunk` whatever else runs: float sums
        depend on where the cuts are, and a request gets the same tokens alone and in a batch."""
        return min(self._left(sequence), self._prefill_chunk)

    def _plan_prefill(self, rows: list[Sequence]) -> Run:
        lens = [self._piece(s) for s in rows]
        width = max(lens)
        first_slot = rows[0].slot
        assert first_slot is not None
        past_len = self.slots.past_len[first_slot : first_slot + len(rows)].copy()
        token_ids = np.zeros((len(rows), width), np.int64)
        for i, (sequence, past, num) in enumerate(zip(rows, past_len.tolist(), lens, strict=True)):
            token_ids[i, :num] = sequence.request.prompt_ids[past : past + num]
        is_last = [num == self._left(s) for s, num in zip(rows, lens, strict=True)]
        wanted = [i * width + lens[i] - 1 for i in range(len(rows)) if is_last[i]]
        scored = []
        for i, sequence in enumerate(rows):
            if sequence.wants_prompt_logits:
                num = lens[i] - is_last[i]  # what comes after the last token is not in the prompt
                scored.append((sequence, num))
                wanted.extend(range(i * width, i * width + num))
        # A run must be asked for at least one row of logits; a chunk in mid-prompt asks for its last and
        # ignores it.
        wanted = wanted or [lens[0] - 1]
        batch = Batch(first_slot, token_ids, past_len, np.array(lens, np.int32), np.array(wanted, np.int64))
        done = [s for s, last in zip(rows, is_last, strict=True) if last]
        return Run(batch, done, num_prefill_tokens=sum(lens), scored=tuple(scored))
