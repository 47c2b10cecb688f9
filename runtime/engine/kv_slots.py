"""Which KV slots are in use, and how many tokens each holds. Knows neither requests nor the cache arrays."""

import heapq

import numpy as np
from numpy.typing import NDArray


class KvSlots:
    """A pool of `num_slots` slots of `capacity` tokens; the lowest free slot is given out first.

    `past_len` int32 [num_slots] counts the valid tokens of each slot, 0 in a free one. The scheduler advances
    it.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self.past_len: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self._free = list(range(num_slots))  # a heap; sorted is one
        self._is_used = [False] * num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return sum(self._is_used)

    @property
    def used_tokens(self) -> int:
        """Valid tokens over all slots."""
        return int(self.past_len.sum())

    @property
    def lowest_free(self) -> int | None:
        return self._free[0] if self._free else None

    def take(self) -> int:
        """Take the lowest free slot; the caller has looked at `num_free`."""
        slot = heapq.heappop(self._free)
        self._is_used[slot] = True
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back, empty."""
        assert self._is_used[slot], f"slot {slot} is not in use"
        self._is_used[slot] = False
        self.past_len[slot] = 0
        heapq.heappush(self._free, slot)
