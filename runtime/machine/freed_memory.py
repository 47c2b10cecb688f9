"""Memory that was freed, back to the operating system: glibc's allocator keeps what lies between pieces in use."""

import ctypes


def give_back_freed() -> None:
    """Return what is free. It takes 20 ms in a process of 1 GB, in which other threads may wait for memory. Other C
    libraries than glibc have no such function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
