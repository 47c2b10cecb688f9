"""Which sequences run in the next step, and in which slots.

Two queues: waiting and, by slot, those that prefill or decode. A step is

    admit      waiting -> lowest free slots, by priority, then fairly by tenant
    compact    decoding rows move down into free slots, so that they stay a tight span (not if idle rows cost nothing)
    decode     one run over slots [0, highest decoding + 1), with drafts where they pay
    reuse      prompts skip the blocks that the prefix cache has
    prefill    runs of as many tokens in all as planning/chunk.py says

so a long prompt never holds up running streams, nor they the prompt. Before a run is planned, kv_memory.py finds memory
for it; where there is none, the youngest request is preempted: it waits again and is computed again. Each part has a
module: admission.py here, the others in planning/. Knows nothing about sampling, text or threads.
"""

import logging
import time
from bisect import insort
from collections.abc import Callable, Iterator

from runtime.engine.admission import Admission
from runtime.engine.answer_lengths import AnswerLengths
from runtime.engine.drafter import Drafter
from runtime.engine.kv_slots import KvSlots
from runtime.engine.planning.chunk import DEFAULT_BOUNDS, FASTEST, ChunkSize, LatencyBounds
from runtime.engine.planning.decode import DecodeRows
from runtime.engine.planning.kv_memory import KvMemory, order_of
from runtime.engine.planning.prefill import FIXED_CUT, LEAST_PIECE, PrefillPlanner
from runtime.engine.planning.reuse import PrefixReuse
from runtime.engine.planning.run import Run
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.sequence import LiveSequence
from runtime.session.session import Session

log = logging.getLogger(__name__)


class Scheduler:
    """Owns the slots and the queues. Uses the session only to copy K and V between slots.

    prefill_chunk: most prompt tokens of a step; None: as the bounds say
    clock: gives seconds
    """

    def __init__(
        self,
        session: Session,
        cache: PrefixCache,
        *,
        prefill_chunk: int | None = None,
        bounds: LatencyBounds = DEFAULT_BOUNDS,
        lengths: AnswerLengths,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        info = session.info
        limit = info.capacity if info.max_chunk is None else info.max_chunk
        chunk = ChunkSize(bounds, fixed=prefill_chunk, limit=limit)
        cut = min(prefill_chunk or FIXED_CUT, limit)
        self.cache = cache
        self.num_preempted = 0
        self._is_sparse, self._is_run_exact = info.is_sparse, info.is_run_exact
        self._most_granted = max(LEAST_PIECE, min(prefill_chunk or FASTEST, limit))
        self.slots = KvSlots(info.num_slots, info.capacity, layout=info.layout, drop=session.drop_slot)
        self.memory = KvMemory(self.slots, cache, info.kv_budget, running=self._running, preempt=self._preempt)
        cache.limit = self.memory.cache_limit
        self._admission = Admission(self.slots, self.memory, lengths)
        self._decode = DecodeRows(session, self.slots, self.memory, prefill_chunk=cut, drafter=drafter)
        self._reuse = PrefixReuse(cache, self.slots, self.memory, prefill_chunk=cut, is_cut_exact=info.is_cut_exact)
        self._prefill = PrefillPlanner(info, self.slots, chunk=chunk, cut=cut)
        self._clock = clock

    @property
    def num_waiting(self) -> int:
        return len(self._admission.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._admission.waiting) or self.slots.num_used > 0

    def add(self, sequence: LiveSequence) -> None:
        """Queue a sequence behind those of its priority."""
        self._admission.add(sequence)

    def plan(self) -> Iterator[Run]:
        """The runs of one step. `advance` each before taking the next."""
        started_s = self._clock()
        self.memory.begin_step()
        for sequence in self._admission.admit(self._running):
            insort(self._prefill.sequences, sequence, key=order_of)
        if not self._is_sparse:
            self._decode.compact()
        if (run := self._decode.plan()) is not None:
            yield run
        unfinished = self._reuse.restore(self._prefill.sequences)
        self.memory.grant(self._prefill.sequences, self._most_granted)
        has_streams = bool(self._decode.sequences)
        yield from self._prefill.plan(unfinished, has_streams=has_streams, started_s=started_s, now_s=self._clock())

    def advance(self, run: Run, seconds: float) -> None:
        """Note that a run is done, in so many seconds: its tokens are in the cache, and finished prompts decode from
        now on."""
        self.slots.note_run(run.batch.first_slot, run.batch.past_len + run.batch.query_len)
        if run.num_decode:
            self._decode.advance(run)
            return
        self._prefill.advance(run, seconds)
        for sequence in run.prefilled:
            self._reuse.keep(sequence)
            if self.slots.past_len[sequence.slot] >= sequence.num_fill:
                self._prefill.sequences.remove(sequence)
                self._decode.add(sequence)

    def accept(self, sequence: LiveSequence) -> None:
        """The next token of its draft was right; its K and V are in the cache."""
        self.slots.past_len[sequence.slot] += 1

    def set_next(self, sequence: LiveSequence, token_id: int) -> None:
        """The token that a sequence runs through the model next."""
        self._decode.set_next(sequence, token_id)

    def remove(self, sequence: LiveSequence) -> None:
        """Drop a sequence, wherever it is; its slot is free at once."""
        if sequence.slot is None:
            self._admission.remove(sequence)
            return
        if not self._decode.remove(sequence):
            self._prefill.sequences.remove(sequence)
        self.slots.release(sequence.slot)
        sequence.slot = None

    def _preempt(self, sequence: LiveSequence) -> None:
        """Take a sequence's slot away; it waits before all new ones of its priority."""
        log.info(
            "request %s was preempted with %d tokens: the KV memory is full",
            sequence.request.request_id,
            self.slots.past_len[sequence.slot],
        )
        self.remove(sequence)
        sequence.begin_again(is_run_exact=self._is_run_exact)
        self._admission.add(sequence)
        self.num_preempted += 1

    def _running(self) -> list[LiveSequence]:
        return [*self._prefill.sequences, *self._decode.sequences]
