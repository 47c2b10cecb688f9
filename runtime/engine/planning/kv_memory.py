"""Keeps the memory of slots and prefix cache within one budget.

Memory is found in this order: pages that free slots still have, the least recently used blocks of the prefix cache, the
pages of the youngest running request, which is preempted.

Requests have a fixed order: by priority, then by their first admission. A request is preempted only for an older one,
and none is accepted that does not fit the budget alone. So the oldest gets every page it asks for and ends after
finitely many steps; then the next one is the oldest. No request waits forever, and none fails for lack of memory.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from runtime.engine.kv_slots import KEEP_S, KvSlots
from runtime.engine.prefix_cache import PrefixCache
from runtime.engine.sequence import LiveSequence

MAX_BYTES = 2**62


class KvMemory:
    """Grants memory to the runs of a step.

    budget: bytes; None: all slots may be full, and nothing is ever preempted
    running: those that have a slot; preempt: takes one's slot away
    """

    def __init__(
        self,
        slots: KvSlots,
        cache: PrefixCache,
        budget: int | None,
        *,
        running: Callable[[], list[LiveSequence]],
        preempt: Callable[[LiveSequence], None],
    ) -> None:
        self._slots, self._cache, self.budget = slots, cache, budget
        self._running, self._preempt = running, preempt

    @property
    def used(self) -> int:
        """Bytes that slots and prefix cache have."""
        return self._slots.committed + self._cache.num_bytes

    @property
    def free(self) -> int | None:
        """Bytes that may be committed; None: any number."""
        return None if self.budget is None else self.budget - self.used

    def cache_limit(self) -> int:
        """Most bytes that the prefix cache may have now: what was granted to the step's later runs is not its own."""
        return MAX_BYTES if self.budget is None else self.budget - self._slots.committed_with(self._slots.granted)

    def begin_step(self) -> None:
        """Give back what free slots have kept for too long."""
        self._slots.drop_kept(KEEP_S)

    def can_admit(self, expected_len: int) -> bool:
        """Whether a request of so many tokens in the end fits beside the running ones, each as long as expected. The
        prefix cache does not count: it makes room. A request that would run alone is always admitted."""
        if self.budget is None or not self._slots.num_used:
            return True
        slots = self._slots
        reserved = slots.layout.all_committed(np.maximum(slots.expected, slots.past_len))
        return reserved + slots.layout.committed(expected_len) <= self.budget

    def fits_after_copy(self, num_tokens: int) -> bool:
        """Whether a slot of so many tokens may be copied to a free one."""
        return self.budget is None or self.used + self._slots.layout.committed(num_tokens) <= self.budget

    def fitting_tokens(self, slot: int) -> int:
        """How many more tokens fit a slot without taking anything from others."""
        past_len, free = int(self._slots.past_len[slot]), self.free
        if free is None:
            return self._slots.capacity - past_len
        layout = self._slots.layout
        return max(0, layout.fitting_tokens(layout.committed(int(self._slots.filled[slot])) + free) - past_len)

    def make_room_to_decode(self, is_decoding: NDArray[np.int32]) -> None:
        """Find memory for one more token of every decoding row; preempts the youngest until the others have it.

        is_decoding: int32 by slot; the rows of preempted sequences become 0 in it
        """
        if self.budget is None:
            return
        while (missing := self._missing(self._slots.past_len + is_decoding)) > 0:
            if not self._reclaim(missing):
                running = self._running()
                assert len(running) > 1, "a request that does not fit was accepted"
                self._preempt(max(running, key=order_of))

    def can_draft(self, is_decoding: NDArray[np.int32], width: int) -> bool:
        """Whether every decoding row may take `width` tokens. Nothing is preempted or evicted for drafts."""
        return self.budget is None or self._missing(self._slots.past_len + is_decoding * np.int32(width)) <= 0

    def grant(self, prefilling: Iterable[LiveSequence], chunk: int) -> None:
        """Set how far each prompt may be filled in this step, in which at most `chunk` tokens run. The oldest come
        first; where memory is short, the youngest wait or are preempted."""
        slots = self._slots
        if self.budget is None:
            return
        waiting = [s for s in prefilling if s.slot is not None]
        wanted = slots.past_len.copy()
        for sequence in waiting:
            wanted[sequence.slot] = self._next_end(sequence, chunk)
        if self._missing(wanted) > 0:
            wanted = slots.past_len.copy()
            for sequence in sorted(waiting, key=order_of):
                if sequence.slot is not None:  # not preempted for an older one
                    self._grant_one(sequence, wanted, chunk)
        slots.granted[:] = wanted

    def _grant_one(self, sequence: LiveSequence, wanted: NDArray[np.int32], chunk: int) -> None:
        slot = sequence.slot
        assert slot is not None
        wanted[slot] = self._next_end(sequence, chunk)
        while (missing := self._missing(wanted)) > 0:
            if self._reclaim(missing):
                continue
            victim = max(self._running(), key=order_of)
            if victim is sequence:  # all others are older: it takes what is left
                wanted[slot] = self._slots.past_len[slot]
                layout, free = self._slots.layout, -self._missing(wanted)
                has = layout.committed(int(self._slots.filled[slot]))
                wanted[slot] = max(
                    wanted[slot], min(self._next_end(sequence, chunk), layout.fitting_tokens(has + free))
                )
                return
            assert victim.slot is not None
            wanted[victim.slot] = 0
            self._preempt(victim)

    def _next_end(self, sequence: LiveSequence, chunk: int) -> int:
        past_len = int(self._slots.past_len[sequence.slot])
        return min(sequence.num_fill, past_len + chunk)

    def _missing(self, wanted: NDArray[np.int32]) -> int:
        """Bytes too few for these lengths by slot; 0 or less if there are enough."""
        assert self.budget is not None
        return self._slots.committed_with(wanted) + self._cache.num_bytes - self.budget

    def _reclaim(self, num_bytes: int) -> bool:
        """Take from those that do not run; False if they have nothing left."""
        return self._slots.drop_kept() or self._cache.evict(num_bytes)


def order_of(sequence: LiveSequence) -> tuple[int, int]:
    """The place of an admitted request in the fixed order, the oldest first."""
    assert sequence.admission_idx is not None
    return sequence.request.options.priority, sequence.admission_idx
