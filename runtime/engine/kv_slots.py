"""Which KV slots are in use, how many tokens each holds, and what memory that takes. Knows neither requests nor the
cache arrays.

A slot is an address range; memory is committed as tokens are written, and given back by `drop`. A slot that was
released may keep its pages for a while, for the next request: committing them again takes 2 % of a prompt's time.
"""

import heapq
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.machine.kv_pages import PageLayout, plain_layout

KEEP_S = 1.0
"""Seconds for which a free slot keeps its pages."""
KEEP_TOKENS = 2048
"""Longest content whose pages are kept: the next request is likely no longer."""


class KvSlots:
    """A pool of `num_slots` slots of `capacity` tokens; the lowest free slot is given out first.

    By slot, int32 [num_slots]:

    past_len  valid tokens, 0 in a free slot; the scheduler advances it
    filled    tokens whose memory is committed, at least `past_len`: garbage of rejected drafts counts
    expected  tokens that the slot's request will probably have in the end
    granted   most tokens that it may hold after this step's prefill
    """

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        *,
        layout: PageLayout | None = None,
        drop: Callable[[int], None] | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self.layout = layout or plain_layout(1)
        self.past_len: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self.filled: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self.expected: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self.granted: NDArray[np.int32] = np.full(num_slots, capacity, np.int32)
        self._drop = drop
        self._free = list(range(num_slots))  # a heap; sorted is one
        self._is_used = [False] * num_slots
        self._kept: dict[int, float] = {}  # free slots with pages, and since when; the first released first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def used_tokens(self) -> int:
        """Valid tokens over all slots."""
        return int(self.past_len.sum())

    @property
    def lowest_free(self) -> int | None:
        return self._free[0] if self._free else None

    @property
    def committed(self) -> int:
        """Bytes committed for all slots."""
        return self.layout.all_committed(self.filled)

    def committed_with(self, lens: NDArray[np.int32]) -> int:
        """The same, once each slot was filled up to these many tokens."""
        return self.layout.all_committed(np.maximum(self.filled, lens))

    def take(self) -> int:
        """Take the lowest free slot; the caller has looked at `num_free`."""
        slot = heapq.heappop(self._free)
        self._is_used[slot] = True
        self._kept.pop(slot, None)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back, empty. All pages go back with the last slot in use."""
        assert self._is_used[slot], f"slot {slot} is not in use"
        self._is_used[slot] = False
        self.past_len[slot] = self.expected[slot] = 0
        heapq.heappush(self._free, slot)
        self._kept[slot] = time.monotonic()
        if self.filled[slot] > KEEP_TOKENS:
            self._drop_slot(slot)
        if not self.num_used:
            self.drop_kept()

    def move(self, source: int, target: int) -> None:
        """Note that a slot's tokens were copied to the lowest free slot; the source is released."""
        taken = self.take()
        assert taken == target, "not the lowest free slot"
        self.past_len[target] = self.past_len[source]
        self.expected[target] = self.expected[source]
        self.fill(target)
        self.release(source)

    def fill(self, first: int, num: int = 1) -> None:
        """Note that slots hold what `past_len` says."""
        span = slice(first, first + num)
        np.maximum(self.filled[span], self.past_len[span], out=self.filled[span])

    def note_run(self, first: int, lens: NDArray[np.int32]) -> None:
        """Note that a run wrote up to these lengths in the slots from `first` on."""
        span = slice(first, first + len(lens))
        np.maximum(self.filled[span], lens, out=self.filled[span])

    def drop_kept(self, older_than_s: float = 0.0) -> bool:
        """Give the pages of free slots back, if they have been free for so long; whether there were any."""
        limit_s = time.monotonic() - older_than_s
        slots = [slot for slot, since_s in self._kept.items() if since_s <= limit_s]
        for slot in slots:
            self._drop_slot(slot)
        return bool(slots)

    def _drop_slot(self, slot: int) -> None:
        del self._kept[slot]
        if self.filled[slot] and self._drop is not None:
            self._drop(slot)
        self.filled[slot] = 0
