"""The rows that decode: what their next run reads, and where they stand. Knows no prompts."""

import numpy as np

from runtime.engine.drafter import Drafter
from runtime.engine.kv_slots import KvSlots
from runtime.engine.planning.kv_memory import KvMemory
from runtime.engine.planning.run import MAX_PLACES, Run
from runtime.engine.sequence import LiveSequence
from runtime.session.session import Batch, Session

IDLE_ROW = 50
"""Tokens that can be copied to another slot while a step runs one idle row. On two cores of a Zen 4 (SmolLM2-135M in
w8a8) 16 idle rows between 16 running ones cost 5.3 ms a step, and copying 180 tokens 1.1 ms."""


class DecodeRows:
    """The decoding sequences by slot, and the runs over slots [0, highest decoding + 1), with drafts where they pay.

    Those that catch up run the tokens again that they had generated before they were preempted. They need no logits
    before the last of these.
    """

    def __init__(
        self, session: Session, slots: KvSlots, memory: KvMemory, *, prefill_chunk: int, drafter: Drafter | None
    ) -> None:
        info = session.info
        self._copy_slot = session.copy_slot
        self._drafter = drafter
        self._is_ragged = info.is_ragged
        self._max_places = MAX_PLACES * prefill_chunk
        self._slots, self._memory = slots, memory
        self._catching_up: list[LiveSequence] = []
        self._sequences: list[LiveSequence | None] = [None] * info.num_slots
        # What the next decode run reads, by slot; the batches below are views of these.
        self._next_ids = np.zeros((info.num_slots, 1), np.int64)
        self._is_decoding = np.zeros(info.num_slots, np.int32)
        self._run: Run | None = None  # kept until a row joins, leaves or moves
        self._num_idle = 0  # idle rows of all steps since a row was moved

    @property
    def sequences(self) -> list[LiveSequence]:
        """Those that decode, by slot."""
        return [sequence for sequence in self._sequences if sequence is not None]

    def add(self, sequence: LiveSequence) -> None:
        """Its prompt is in the cache: it decodes from now on."""
        assert sequence.slot is not None
        self._sequences[sequence.slot] = sequence
        self._is_decoding[sequence.slot] = 1
        self._run = None
        if sequence.is_catching_up:
            self._catching_up.append(sequence)
            self._catch_up()

    def remove(self, sequence: LiveSequence) -> bool:
        """Drop a sequence; False if it does not decode."""
        if sequence.slot is None or self._sequences[sequence.slot] is not sequence:
            return False
        self._clear_row(sequence.slot)
        if sequence in self._catching_up:
            self._catching_up.remove(sequence)
        return True

    def set_next(self, sequence: LiveSequence, token_id: int) -> None:
        """The token that a sequence runs through the model next."""
        self._next_ids[sequence.slot, 0] = token_id

    def advance(self, run: Run) -> None:
        """The next token of each row is in the cache."""
        span = len(run.batch.past_len)
        self._slots.past_len[:span] += self._is_decoding[:span]
        if self._catching_up:
            self._catch_up()

    def _catch_up(self) -> None:
        """Set the next tokens of those that catch up. At its last one a sequence has caught up."""
        for sequence in list(self._catching_up):
            place = int(self._slots.past_len[sequence.slot])
            self.set_next(sequence, sequence.fill_ids[place])
            if place == len(sequence.fill_ids) - 1:
                self._catching_up.remove(sequence)
                self._run = None

    def compact(self) -> None:
        """Move the highest decoding rows into free slots below, once steps have lost as much time to idle rows as a
        copy takes: a request that arrives soon fills the gap for nothing. What waits has been admitted by now."""
        span = self._span()
        self._num_idle += span - int(self._is_decoding.sum())
        while (target := self._slots.lowest_free) is not None:
            source = self._span() - 1
            if source < target:
                self._num_idle = 0
                return
            sequence = self._sequences[source]
            assert sequence is not None
            num_tokens = int(self._slots.past_len[source])
            if num_tokens > self._num_idle * IDLE_ROW or not self._memory.fits_after_copy(num_tokens):
                return
            self._num_idle -= -(-num_tokens // IDLE_ROW)
            self._copy_slot(source, target, num_tokens)
            self._slots.move(source, target)
            self._sequences[target], self._is_decoding[target] = sequence, 1
            self._next_ids[target] = self._next_ids[source]
            sequence.slot = target
            self._clear_row(source)

    def plan(self) -> Run | None:
        """The run of this step; None if nothing decodes."""
        self._memory.make_room_to_decode(self._is_decoding)
        span = self._span()
        if self._run is None and span:
            sequences = [s for s in self._sequences[:span] if s is not None and s not in self._catching_up]
            # A run must be asked for one row of logits.
            rows = np.array([s.slot for s in sequences] or [span - 1], np.int64)
            # A session that is not ragged runs every row: those that do not decode write one garbage token
            # behind their valid ones, where the next chunk overwrites it.
            query_len = self._is_decoding[:span] if self._is_ragged else np.ones(span, np.int32)
            batch = Batch(0, self._next_ids[:span], self._slots.past_len[:span], query_len, rows)
            num_decode = len(sequences) + len(self._catching_up)
            self._run = Run(batch, sequences, num_decode=num_decode)
        if self._run is not None and self._drafter is not None and self._run.sequences:
            room = self._slots.capacity - int(self._slots.past_len[:span].max())
            width = min(room, self._max_places // span)
            if not self._memory.can_draft(self._is_decoding, width):
                return self._run
            drafts = self._drafter.draft(self._run.sequences, max(0, width - 1))
            if drafts is not None:
                return self._with_drafts(self._run, drafts)
        return self._run

    def _with_drafts(self, plain: Run, drafts: list[list[int]]) -> Run:
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

    def _clear_row(self, slot: int) -> None:
        self._sequences[slot] = None
        self._is_decoding[slot] = 0
        self._next_ids[slot, 0] = 0
        self._run = None

    def _span(self) -> int:
        """One more than the highest decoding slot."""
        rows = np.flatnonzero(self._is_decoding)
        return int(rows[-1]) + 1 if len(rows) else 0
