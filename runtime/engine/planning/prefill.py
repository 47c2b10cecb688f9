"""The prompts that prefill: in which order, cut into which pieces, and which of them share a run."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.engine.admission import priority_of
from runtime.engine.kv_slots import KvSlots
from runtime.engine.planning.chunk import LEAST, ChunkSize, PendingPrompt, Piece
from runtime.engine.planning.run import MAX_PLACES, Run
from runtime.engine.prefix_cache import BLOCK_LEN
from runtime.engine.sequence import LiveSequence
from runtime.session.session import Batch, SessionInfo

FIXED_CUT = 128
"""Tokens of a piece where tokens depend on the cuts, unless `--prefill-chunk` says otherwise."""
LEAST_PIECE = 3
"""Tokens for which a prompt must have memory: of three, two can run now without leaving one over."""
MAX_SCORED = 128
"""Most rows of logits of a run: one of 512 would hold 300 MB of them with a vocabulary of 150,000."""


class _Row(NamedTuple):
    """The next tokens of a prompt."""

    sequence: LiveSequence
    slot: int
    num: int


class PrefillPlanner:
    """The sequences in slots whose prompts are not in the cache yet. `sequences` are in the order of `order_of`.

    cut: tokens of every piece but a prompt's last, where the session is not cut-exact
    """

    def __init__(self, info: SessionInfo, slots: KvSlots, *, chunk: ChunkSize, cut: int) -> None:
        self.sequences: list[LiveSequence] = []
        self._slots = slots
        self._chunk = chunk
        self._cut = None if info.is_cut_exact else cut
        self._is_oldest_turn = False
        self._is_ragged, self._is_sparse, self._has_states = info.is_ragged, info.is_sparse, info.has_states
        self._max_scored = min(MAX_SCORED, chunk.limit, info.capacity if info.max_scored is None else info.max_scored)

    def plan(
        self, unfinished: Collection[LiveSequence], *, has_streams: bool, started_s: float, now_s: float
    ) -> Iterator[Run]:
        """The runs of a step that began at `started_s`, all but for `unfinished` ones. Advance `past_len` by each
        before taking the next."""
        pending = [s for s in self._in_order() if s not in unfinished and self._has_memory(s)]
        if not pending:
            return
        prompts = [self._prompt(sequence, now_s) for sequence in pending]
        budget = self._chunk.of_step(prompts, has_streams=has_streams, elapsed_s=now_s - started_s)
        if self._cut is None:  # as many steps as it takes, but even ones: 2 of 77 tokens, not 128 and 26
            num_left = sum(prompt.left.num_tokens for prompt in prompts)
            budget = -(-num_left // -(-num_left // budget))
        is_first = True
        while rows := self._share_run(pending, budget, is_first=is_first):
            run = self._run_of(rows)
            budget -= run.num_prefill_tokens
            known = {key for row in rows for key in self._blocks_of(row)}
            pending = [s for s in pending if s not in run.prefilled and self._next_block(s) not in known]
            is_first = False
            yield run

    def advance(self, run: Run, seconds: float) -> None:
        """Note that the tokens of a run are in the cache, and how long it took."""
        batch = run.batch
        past_len = self._slots.past_len[batch.first_slot : batch.first_slot + len(batch.query_len)]
        pieces = zip(batch.query_len.tolist(), past_len.tolist(), strict=True)
        self._chunk.observe([Piece(num, past) for num, past in pieces if num], seconds)
        past_len += batch.query_len

    def _prompt(self, sequence: LiveSequence, now_s: float) -> PendingPrompt:
        left = self._left(sequence)
        return PendingPrompt(Piece(left, sequence.num_fill - left), sequence.num_fill, now_s - sequence.submitted_s)

    def _in_order(self) -> list[LiveSequence]:
        """Prompts in the order in which they run: by priority, then by turns the oldest or the shortest rest first. So
        a short prompt waits for one chunk of a long one, and a long one gets a chunk every other step."""
        self._is_oldest_turn = not self._is_oldest_turn
        if self._is_oldest_turn:
            return sorted(self.sequences, key=priority_of)
        return sorted(self.sequences, key=lambda s: (priority_of(s), self._left(s)))

    def _left(self, sequence: LiveSequence) -> int:
        """Prompt tokens not yet in the cache."""
        return sequence.num_fill - int(self._slots.past_len[sequence.slot])

    def _granted(self, sequence: LiveSequence) -> int:
        """Tokens for which it has memory in this step."""
        return int(self._slots.granted[sequence.slot] - self._slots.past_len[sequence.slot])

    def _has_memory(self, sequence: LiveSequence) -> bool:
        """Whether it may run a piece in this step."""
        return self._granted(sequence) >= min(self._left(sequence), self._cut or LEAST_PIECE)

    def _share_run(self, pending: Sequence[LiveSequence], budget: int, *, is_first: bool) -> list[_Row]:
        """Pieces of pending prompts for one run of at most `budget` tokens, by slot: the first one, and those after it
        that fit in its run. A step's later runs begin no prompt with less than what is worth a run."""
        rows: list[_Row] = []
        blocks = set[bytes | None]()
        for sequence in pending:
            assert sequence.slot is not None
            if self._next_block(sequence) in blocks:
                continue  # it will find that block in the prefix cache
            num = self._piece(sequence, budget, must=is_first and not rows)
            is_crumb = not is_first and not rows and num < min(LEAST, self._left(sequence))
            if (not num or is_crumb) and not rows:
                return []  # none overtakes the first one
            row = _Row(sequence, sequence.slot, num)
            blocks |= self._blocks_of(row)
            if not num or (rows and not self._fits([*rows, row])):
                continue
            rows.append(row)
            budget -= num
            if not self._is_ragged or budget <= 0:
                break
        return sorted(rows, key=lambda row: row.slot)

    def _blocks_of(self, row: _Row) -> set[bytes | None]:
        """The blocks for the prefix cache that a piece computes, to their end or not; at least the next one."""
        past = int(self._slots.past_len[row.slot])
        return set(row.sequence.prefix_keys[past // BLOCK_LEN : -(-(past + max(1, row.num)) // BLOCK_LEN)])

    def _next_block(self, sequence: LiveSequence) -> bytes | None:
        """The block that the prefix cache could give it next."""
        idx, offset = divmod(int(self._slots.past_len[sequence.slot]), BLOCK_LEN)
        return None if offset or idx >= len(sequence.prefix_keys) else sequence.prefix_keys[idx]

    def _piece(self, sequence: LiveSequence, budget: int, *, must: bool) -> int:
        """Tokens of its next piece, 0 for none; never a single one of a longer prompt. A run of one token takes another
        attention kernel than longer runs, whose sums do not depend on where the prompt is cut. So a request gets the
        same tokens alone and in a batch, with its beginning computed or cached.

        must: take a piece in any case
        """
        left = self._left(sequence)
        most = min(budget, self._granted(sequence)) if self._cut is None else self._cut
        if sequence.wants_prompt_logits:
            most = min(most, self._max_scored)
        num = min(left, most, self._to_last_block(sequence))
        if left - num == 1 and num > 1:
            num -= 1
        if num > 1 or left == 1:
            return num if num <= budget or must else 0
        return num if must else 0

    def _to_last_block(self, sequence: LiveSequence) -> int:
        """Tokens up to the end of the last block that the prefix cache may keep, because it copies states there. All
        tokens if there are no states, if the end is past, or if a single token is left to it."""
        left = len(sequence.prefix_keys) * BLOCK_LEN - int(self._slots.past_len[sequence.slot])
        return left if self._has_states and left > 1 else self._left(sequence)

    def _fits(self, rows: Sequence[_Row]) -> bool:
        """Whether these pieces may go in one run."""
        width = max(row.num for row in rows)
        if min(row.num for row in rows) == 1 < width:
            return False  # another kernel, see `_piece`
        scored = [row.num for row in rows if row.sequence.wants_prompt_logits]
        if scored and (sum(scored) > self._max_scored or width > self._max_scored):
            return False
        if self._is_sparse:
            return True
        # Slots between them cost little beside a run of their own: 5 % for seven.
        first, last = min(row.slot for row in rows), max(row.slot for row in rows)
        num_places = (last - first + 1) * width
        ends = self._slots.past_len[first : last + 1] + width
        return num_places <= MAX_PLACES * self._chunk.limit and bool(ends.max() <= self._slots.capacity)

    def _run_of(self, rows: Sequence[_Row]) -> Run:
        """A run of these pieces, ordered by slot. Slots between them are idle."""
        first, last = rows[0].slot, rows[-1].slot
        width, span = max(row.num for row in rows), last - first + 1
        token_ids, query_len = np.zeros((span, width), np.int64), np.zeros(span, np.int32)
        past_len = self._slots.past_len[first : last + 1].copy()
        wanted, scored, done = [], list[tuple[LiveSequence, int]](), []
        for sequence, slot, num in rows:
            place, past = slot - first, int(past_len[slot - first])
            token_ids[place, :num] = sequence.fill_ids[past : past + num]
            query_len[place] = num
            if past + num == sequence.num_fill and not sequence.is_catching_up:
                wanted.append(place * width + num - 1)
                done.append(sequence)
        for sequence, slot, num in rows:
            if sequence.wants_prompt_logits:
                num_scored = num - (sequence in done)  # the token after the last one is not in the prompt
                scored.append((sequence, num_scored))
                start = (slot - first) * width
                wanted.extend(range(start, start + num_scored))
        # A run must be asked for at least one row of logits; a chunk in mid-prompt asks for its last and
        # ignores it.
        wanted = wanted or [rows[0].num - 1]
        batch = Batch(first, token_ids, past_len, query_len, np.array(wanted, np.int64))
        prefilled = tuple(row.sequence for row in rows)
        return Run(
            batch, done, num_prefill_tokens=sum(row.num for row in rows), prefilled=prefilled, scored=tuple(scored)
        )
