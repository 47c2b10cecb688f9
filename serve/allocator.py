"""glibc's allocator, set up for a process with a thread for every request.

glibc keeps freed pieces for the thread that freed them, seven of each size up to 1,032 bytes: 236 KB a thread. Threads
meet the rarer sizes late, so with a hundred threads resident memory grows for ten thousand requests though nothing more
is in use. The limit is read when a process begins, and from nowhere but its environment; hence a second beginning.
"""

import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
CACHED_BYTES = 128
"""The largest piece that a thread keeps: what is left is 6 KB a thread, of the sizes that are asked for most. Python's
own objects up to 512 bytes come from pools of Python's, and tensors never were kept."""


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to begin with; None if this one says already what threads may keep."""
    given = environment.get(VARIABLE, "")
    if "glibc.malloc.tcache" in given:
        return None
    setting = f"glibc.malloc.tcache_max={CACHED_BYTES}"
    return {**environment, VARIABLE: f"{given}:{setting}" if given else setting}


def begin_again_tuned() -> None:
    """Replace this process by the same command with the limit set; returns where that is done or means nothing.

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
