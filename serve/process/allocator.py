"""Settings of glibc's allocator for a process with one thread per request.

By default glibc keeps memory that nothing uses any more, in two places:

    thread caches   each thread keeps pieces that it freed, seven of each size up to 1,032 bytes: 240 KB a thread
    heaps           eight for each processor core, and none gives its free memory to another

In a storm of 10,000 requests the server grew by 5 to 6 % without these settings, and by 1.6 to 1.8 % with them
(benchmarks/README.md). glibc reads `tcache_max` from the environment alone, when a process starts. So the process
replaces itself once, which takes 40 ms, and `headrace serve` behaves the same with and without a service unit.
"""

import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
CACHED_BYTES = 128
"""The largest piece that a thread keeps, which bounds its cache to 5 KB. Python has its own pools for objects of up to
512 bytes, and glibc never caches pieces above 1,032 bytes."""
NUM_HEAPS = 2
"""Python's lock is held during most allocations, so more heaps would seldom be used at once."""
SETTINGS = f"glibc.malloc.tcache_max={CACHED_BYTES}:glibc.malloc.arena_max={NUM_HEAPS}"


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment with SETTINGS added; None if it already has settings of this allocator."""
    given = environment.get(VARIABLE, "")
    if "glibc.malloc." in given or any(name.startswith("MALLOC_") for name in environment):
        return None
    return {**environment, VARIABLE: f"{given}:{SETTINGS}" if given else SETTINGS}


def restart_tuned() -> None:
    """Replace this process by the same command with SETTINGS. Returns if they are set already, or without glibc.

    Call it before opening files or starting threads, which would be lost. The process id stays the same.
    """
    environment = tuned(os.environ)
    if environment is not None and sys.executable and _is_glibc():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - no shell wanted


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # another system or another C library
        return False
