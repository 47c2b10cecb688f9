"""glibc's allocator, set up for a process of many threads that come and go."""

import ctypes

_M_ARENA_MAX = -8
"""malloc.h; `mallopt` has no other name for it."""
NUM_ARENAS = 1
"""glibc makes up to eight heaps a processor core, one for each thread that finds the others busy, and none gives back
what another could use. Over 2,500 requests of every kind from 32 threads memory grew by 1.3 % with one heap, 3.2 % with
two. Python holds its own lock while it allocates and takes small pieces from pools of its own, so that more heaps would
hardly ever be used at once; tensors do not come from them."""


def limit_arenas() -> None:
    """Call it before the threads start. A C library without arenas (musl) has nothing to limit."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, NUM_ARENAS)
