"""glibc's allocator, set up for a process with a thread for every request.

Two habits of it make resident memory grow for ten thousand requests though nothing more is in use:

    caches    freed pieces are kept for the thread that freed them, seven of each size up to 1,032 bytes: 240 KB a
              thread, filled slowly because threads meet the rarer sizes late
    heaps     eight a processor core, and none gives what it has free to another

The limits are read when a process begins, the first from nowhere but its environment; hence a second beginning.
"""

import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
CACHED_BYTES = 128
"""The largest piece that a thread keeps: what is left is at most 5 KB a thread. Python's own objects up to 512 bytes
come from pools of Python's in any case, and larger pieces than 1,032 bytes never were kept."""
NUM_HEAPS = 2
"""Python's lock is held for most of what is allocated, so that more would seldom be used at once."""
SETTINGS = f"glibc.malloc.tcache_max={CACHED_BYTES}:glibc.malloc.arena_max={NUM_HEAPS}"


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to begin with; None if somebody has set this allocator up already."""
    given = environment.get(VARIABLE, "")
    if "glibc.malloc." in given or any(name.startswith("MALLOC_") for name in environment):
        return None
    return {**environment, VARIABLE: f"{given}:{SETTINGS}" if given else SETTINGS}


def begin_again_tuned() -> None:
    """Replace this process by the same command with the limits set; returns where that is done or means nothing.

    Call it before anything else is begun: open files and threads would be lost. The process id stays.
    """
    environment = tuned(os.environ)
    if environment is not None and sys.executable and _is_glibc():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - no shell wanted


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # another system, another C library
        return False
