"""Which sequences run in the next step, and in which slots.

Two queues: waiting and, by slot, those that prefill or decode. A step is

    admit      waiting -> lowest free slots, by priority, then fairly by tenant
    compact    decoding rows move down into free slots, so that they stay a tight span
    decode     one run over slots [0, highest decoding + 1), with drafts where they pay
    reuse      prompts skip the blocks that the prefix cache has
    prefill    runs of at most `prefill_chunk` tokens in all

so a long prompt never holds up running streams, nor they the prompt. Knows nothing about sampling, text or threads.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from math import lcm
from typing import NamedTuple

import numpy as np

from runtime.engine.drafter import Drafter
from runtime.engine.kv_slots import KvSlots
from runtime.engine.prefix_cache import BLOCK_LEN, PrefixCache
from runtime.engine.sequence import LiveSequence
from runtime.session.session import Batch, Session

MAX_PLACES = 2
"""Most places of a run, padding included, for each token of a chunk. Padding costs memory and no time: attention scores
may take rows * width * heads * capacity floats."""

RESTORE_SPEED = 16
"""Tokens that a step may copy out of the prefix cache for each one it may prefill: copying is more than 16 times as
fast, so running streams wait no longer for a prompt that is reused than for one that is computed."""


class Run(NamedTuple):
    """One call of the session. Row i of its logits belongs to `sequences[i]`. The rows after those belong to the
    prompts in `scored`, as many to each as stands there; further rows are ignored."""

    batch: Batch
    sequences: list[LiveSequence]
    num_decode: int = 0
    num_prefill_tokens: int = 0
    prefilled: tuple[LiveSequence, ...] = ()
    """The sequences whose prompts it runs, to their end or not."""
    scored: tuple[tuple[LiveSequence, int], ...] = ()
    drafts: tuple[list[int], ...] = ()
    """Draft tokens of each sequence. Each has one more row of logits."""


class Scheduler:
    """Owns the slots and the queues. Uses the session only to copy K and V between slots."""

    def __init__(
        self, session: Session, cache: PrefixCache, *, prefill_chunk: int, drafter: Drafter | None = None
    ) -> None:
        info = session.info
        self._drafter = drafter
        self.cache = cache
        self.slots = KvSlots(info.num_slots, info.capacity)
        self.waiting: list[LiveSequence] = []  # by priority, then first in, first out
        self._copy_slot = session.copy_slot
        self._prefill_chunk = prefill_chunk
        self._is_oldest_turn = False
        # Unless runs are chunk-invariant, a cached prompt is cut where a computed one is: at multiples of the chunk.
        self._restore_multiple = 1 if info.is_cut_exact else lcm(prefill_chunk, BLOCK_LEN) // BLOCK_LEN
        self._is_ragged = info.is_ragged
        self._max_scored = info.capacity if info.max_scored is None else info.max_scored
        self._prefilling: list[LiveSequence] = []  # in order of admission
        self._decoding: list[LiveSequence | None] = [None] * info.num_slots
        # What the next decode run reads, by slot; the batches below are views of these.
        self._next_ids = np.zeros((info.num_slots, 1), np.int64)
        self._is_decoding = np.zeros(info.num_slots, np.int32)
        self._decode_run: Run | None = None  # kept until a row joins, leaves or moves

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.slots.num_used > 0

    def add(self, sequence: LiveSequence) -> None:
        """Queue a sequence behind those of its priority."""
        insort(self.waiting, sequence, key=_priority)

    def plan(self) -> Iterator[Run]:
        """The runs of one step. `advance` each before taking the next."""
        self._admit()
        self._compact()
        if (run := self._plan_decode()) is not None:
            yield run
        unfinished = self._reuse()
        budget = self._prefill_chunk
        pending = [sequence for sequence in self._prefill_order() if sequence not in unfinished]
        while pending and self._piece(pending[0]) <= budget:
            rows = self._share_run(pending, budget)
            run = self._plan_prefill(rows)
            budget -= run.num_prefill_tokens
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
        for sequence in run.prefilled:
            self._keep(sequence)
        for sequence in run.sequences:
            assert sequence.slot is not None
            self._prefilling.remove(sequence)
            self._decoding[sequence.slot] = sequence
            self._is_decoding[sequence.slot] = 1
            self._decode_run = None

    def accept(self, sequence: LiveSequence) -> None:
        """The next token of its draft was right; its K and V are in the cache."""
        self.slots.past_len[sequence.slot] += 1

    def set_next(self, sequence: LiveSequence, token_id: int) -> None:
        """The token that a sequence runs through the model next."""
        self._next_ids[sequence.slot, 0] = token_id

    def remove(self, sequence: LiveSequence) -> None:
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
            sequence = self._next_waiting()
            self.waiting.remove(sequence)
            sequence.slot = self.slots.take()
            self._next_ids[sequence.slot, 0] = 0
            self._prefilling.append(sequence)

    def _next_waiting(self) -> LiveSequence:
        """Among the most urgent, the first one of the tenant with the fewest slots: no tenant keeps others out by
        asking for every slot."""
        first = self.waiting[0]
        urgent = list(takewhile(lambda s: _priority(s) == _priority(first), self.waiting))
        if all(_tenant(s) == _tenant(first) for s in urgent):
            return first
        running = Counter(_tenant(s) for s in (*self._prefilling, *self._decoding) if s is not None)
        return min(urgent, key=lambda s: running[_tenant(s)])

    def _compact(self) -> None:
        """Move the highest decoding rows into free slots below; what waits has been admitted by now."""
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
        if self._decode_run is not None and self._drafter is not None:
            room = self.slots.capacity - int(self.slots.past_len[:span].max())
            width = min(room, MAX_PLACES * self._prefill_chunk // span)
            drafts = self._drafter.draft(self._decode_run.sequences, max(0, width - 1))
            if drafts is not None:
                return self._plan_verify(self._decode_run, drafts)
        return self._decode_run

    def _plan_verify(self, plain: Run, drafts: list[list[int]]) -> Run:
        """A decode run whose rows contain their drafts, with logits for each draft token."""
        width = 1 + max(map(len, drafts))
        token_ids = np.zeros((len(plain.batch.past_len), width), np.int64)
        token_ids[:, 0] = plain.batch.token_ids[:, 0]
        query_len, wanted = plain.batch.query_len.copy(), list[int]()
        for sequence, draft in zip(plain.sequences, drafts, strict=True):
            slot = sequence.slot
            assert slot is not None
            token_ids[slot, 1 : 1 + len(draft)] = draft
            query_len[slot] += len(draft)
            wanted.extend(range(slot * width, slot * width + len(draft) + 1))
        batch = Batch(0, token_ids, plain.batch.past_len, query_len, np.array(wanted, np.int64))
        return plain._replace(batch=batch, drafts=tuple(drafts))

    def _share_run(self, pending: list[LiveSequence], budget: int) -> list[LiveSequence]:
        """The first pending sequence, and neighbours that fit in its run, by slot."""
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

    def _fits(self, rows: list[LiveSequence], budget: int) -> bool:
        """Whether the next pieces of these prompts may go in one run."""
        lens = [self._piece(s) for s in rows]
        width = max(lens)
        if min(lens) == 1 < width:
            return False  # another kernel, see `_piece`
        if width > self._max_scored and any(s.wants_prompt_logits for s in rows):
            return False
        ends = [self.slots.past_len[s.slot] + width for s in rows]
        num_places = len(rows) * width
        return sum(lens) <= budget and num_places <= MAX_PLACES * budget and bool(max(ends) <= self.slots.capacity)

    def _left(self, sequence: LiveSequence) -> int:
        """Prompt tokens not yet in the cache."""
        return sequence.num_prompt - int(self.slots.past_len[sequence.slot])

    def _piece(self, sequence: LiveSequence) -> int:
        """Tokens of its next chunk; never a single one of a longer prompt. A run of one token takes another attention
        kernel than longer runs, whose sums do not depend on where the prompt is cut. So a request gets the same tokens
        alone and in a batch, with its beginning computed or cached."""
        left = self._left(sequence)
        chunk = min(self._prefill_chunk, self._max_scored) if sequence.wants_prompt_logits else self._prefill_chunk
        if left == chunk + 1 > 2:
            return chunk - 1
        return min(left, chunk)

    def _prefill_order(self) -> list[LiveSequence]:
        """Prompts in the order in which they run: by priority, then by turns the oldest or the shortest rest first. So
        a short prompt waits for one chunk of a long one, and a long one gets a chunk every other step."""
        self._is_oldest_turn = not self._is_oldest_turn
        if self._is_oldest_turn:
            return sorted(self._prefilling, key=_priority)
        return sorted(self._prefilling, key=lambda s: (_priority(s), self._left(s)))

    def _reuse(self) -> list[LiveSequence]:
        """Fill slots from the prefix cache; return the sequences with more to copy in the next step.

        Called in every step: of two prompts that arrive together, the second reuses what the first has computed.
        """
        left = max(self._prefill_chunk * RESTORE_SPEED // BLOCK_LEN, self._restore_multiple)
        unfinished = []
        for sequence in self._prefilling:
            slot, keys = sequence.slot, sequence.prefix_keys
            assert slot is not None
            first, offset = divmod(int(self.slots.past_len[slot]), BLOCK_LEN)
            if offset or first >= len(keys):
                continue
            num_restored = self.cache.restore(keys, slot, first, left, self._restore_multiple)
            self.slots.past_len[slot] += num_restored * BLOCK_LEN
            sequence.request.usage.num_cached += num_restored * BLOCK_LEN
            sequence.num_kept = first = first + num_restored
            left -= num_restored
            if left < self._restore_multiple and self.cache.has(keys[first : first + self._restore_multiple]):
                unfinished.append(sequence)
        return unfinished

    def _keep(self, sequence: LiveSequence) -> None:
        """Store the blocks of its prompt that are complete now."""
        if sequence.prefix_keys:
            assert sequence.slot is not None
            stop = min(int(self.slots.past_len[sequence.slot]) // BLOCK_LEN, len(sequence.prefix_keys))
            self.cache.keep(sequence.prefix_keys, sequence.slot, sequence.num_kept, stop)
            sequence.num_kept = stop

    def _plan_prefill(self, rows: list[LiveSequence]) -> Run:
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
                num = lens[i] - is_last[i]  # the token after the last one is not in the prompt
                scored.append((sequence, num))
                wanted.extend(range(i * width, i * width + num))
        # A run must be asked for at least one row of logits; a chunk in mid-prompt asks for its last and
        # ignores it.
        wanted = wanted or [lens[0] - 1]
        batch = Batch(first_slot, token_ids, past_len, np.array(lens, np.int32), np.array(wanted, np.int64))
        done = [s for s, last in zip(rows, is_last, strict=True) if last]
        return Run(batch, done, num_prefill_tokens=sum(lens), prefilled=tuple(rows), scored=tuple(scored))


def _priority(sequence: LiveSequence) -> int:
    return sequence.request.options.priority


def _tenant(sequence: LiveSequence) -> str:
    return sequence.request.options.tenant
