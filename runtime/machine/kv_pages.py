"""Memory for K and V that the operating system commits page by page, as tokens are written, and takes back by slot.

    slot       an address range for a whole context; costs nothing
    stream     K or V of one head of one layer in a slot: tokens lie one behind the other
    page       what the system commits at the first write: 4 KiB on most machines

Pages of 4 KiB, never huge ones: a huge page commits 2 MB of each stream at its first token. Sixteen requests of 130
tokens on Qwen2.5-0.5B took 1,508 MB with huge pages and 70 MB without, at the same speed (benchmarks/README.md).
Memory is mapped here and not taken from the heap, because the heap keeps what was once used when a model is replaced.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.machine.sizes import item_bytes

PAGE_BYTES = mmap.PAGESIZE
MAP_NORESERVE = 0x4000
"""Linux's flag, which Python 3.11 does not name. Without it a mapping larger than all of the memory is refused."""


class PageLayout(NamedTuple):
    """How much memory the tokens of a slot commit: `num_streams` streams, each of which begins at a page.

    token_bytes: of one token in one stream
    num_spare: positions behind the last token that a run may write as well
    """

    token_bytes: int
    num_streams: int
    page_bytes: int = PAGE_BYTES
    num_spare: int = 0

    def committed(self, num_tokens: int) -> int:
        """Bytes that the first `num_tokens` tokens of a slot commit; 0 for an empty slot."""
        if num_tokens <= 0:
            return 0
        return -(-(num_tokens + self.num_spare) * self.token_bytes // self.page_bytes) * self.step_bytes

    def all_committed(self, num_tokens: NDArray[np.int32]) -> int:
        """Bytes that several slots commit together."""
        filled = num_tokens[num_tokens > 0].astype(np.int64) + self.num_spare
        return int((-(-filled * self.token_bytes // self.page_bytes)).sum()) * self.step_bytes

    def fitting_tokens(self, num_bytes: int) -> int:
        """The longest sequence that commits at most `num_bytes`."""
        num_pages = num_bytes // self.step_bytes
        return max(0, num_pages * self.page_bytes // self.token_bytes - self.num_spare)

    @property
    def step_bytes(self) -> int:
        """What a slot commits when one more page of each stream is needed."""
        return self.num_streams * self.page_bytes


def head_layout(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: str) -> PageLayout:
    """The layout in which every head of every layer has a stream for K and one for V."""
    return PageLayout(head_dim * item_bytes(dtype), 2 * num_layers * num_kv_heads)


def plain_layout(bytes_per_token: int) -> PageLayout:
    """The layout of memory that is counted by tokens."""
    return PageLayout(bytes_per_token, 1, page_bytes=bytes_per_token)


def aligned_len(num_tokens: int, token_bytes: int) -> int:
    """The least length of a stream, at least `num_tokens`, that ends at a page's end."""
    unit = PAGE_BYTES // math.gcd(PAGE_BYTES, token_bytes)
    return -(-num_tokens // unit) * unit


class LazyArrays:
    """Arrays of zeros `[num_slots, ...]`, one behind the other in one mapping; pages of a slot can be given back.

    Raises MemoryError if there are not even so many addresses. All of the memory goes back with the last view of it.
    """

    def __init__(self, count: int, shape: Sequence[int], dtype: DTypeLike) -> None:
        self._array_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._slot_bytes = self._array_bytes // shape[0]
        self._pages = _mapped(count * self._array_bytes)
        whole = np.frombuffer(self._pages, dtype).reshape(count, *shape)
        self.arrays: list[NDArray[Any]] = list(whole)

    def drop_slot(self, slot: int) -> None:
        """Give the pages back that this slot alone uses. It reads as zeros afterwards."""
        for idx in range(len(self.arrays)):
            start = idx * self._array_bytes + slot * self._slot_bytes
            first, stop = -(-start // PAGE_BYTES) * PAGE_BYTES, (start + self._slot_bytes) // PAGE_BYTES * PAGE_BYTES
            if first < stop:
                self._pages.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def free(self) -> None:
        """Let go of the arrays. Idempotent."""
        self.arrays.clear()


def resident_bytes(array: NDArray[Any]) -> int:
    """Bytes of the pages of an array that are in memory, by the system's own account (mincore). It takes a
    millisecond for each few gigabytes of addresses."""
    first = array.ctypes.data // PAGE_BYTES * PAGE_BYTES
    num_bytes = array.ctypes.data + array.nbytes - first
    present = np.zeros(-(-num_bytes // PAGE_BYTES), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), ctypes.c_void_p(present.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((present & 1).sum()) * PAGE_BYTES


def _mapped(num_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        pages = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(
            f"{num_bytes:,} bytes of addresses cannot be mapped: {error}; lower --max-batch or --max-len, or let the "
            "system overcommit memory (vm.overcommit_memory, ulimit -v)"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # Many systems give huge pages to every mapping; a kernel without them fails.
        with suppress(OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
