"""How many threads this process may use for its connections: as many as the system leaves room for.

Containers limit tasks (`pids.max` of a control group: docker --pids-limit, podPidsLimit of Kubernetes), and so do
logins (`ulimit -u`). Once the limit is reached, any new thread fails, also one that the model's library starts. So the
server stays below it.
"""

import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from runtime.machine.control_groups import control_group_paths, read_number

LEAST_THREADS = 8
"""Used even if there is no room; then a connection that finds no thread is closed."""
OTHER_THREADS = 64
"""For engines, token masks, grammars, traces, drains and a helper process; two models' threads per core come on top."""

log = logging.getLogger(__name__)


def threads_for(num_connections: int, root: Path = Path("/")) -> int:
    """The number of threads for `num_connections`; logs a warning if the system has room for fewer.

    `root` is the directory that contains /proc and /sys.
    """
    rooms = [room for room in (*_group_rooms(root), _user_room(root)) if room is not None]
    spare = OTHER_THREADS + 2 * (os.cpu_count() or 1)
    num_threads = min(num_connections, max(LEAST_THREADS, min(rooms, default=num_connections + spare) - spare))
    if num_threads < num_connections:
        log.warning(
            "at most %d requests are answered at once, on %d connections: the system leaves %d threads (pids.max, "
            "ulimit -u), and %d of them are for other work",
            *(num_threads, num_connections, min(rooms), spare),
        )
    return num_threads


def _group_rooms(root: Path) -> Iterator[int]:
    """Threads that each control group of this process still allows."""
    for group in control_group_paths(root, "pids"):
        limit, used = read_number(group / "pids.max"), read_number(group / "pids.current")
        if limit is not None and used is not None:
            yield max(0, limit - used)


def _user_room(root: Path) -> int | None:
    """Threads that `ulimit -u` still allows; it counts all threads of the user. None: no limit, or the user is root."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    user = os.getuid()
    if limit == resource.RLIM_INFINITY or user == 0:
        return None
    used = 0
    for process in (root / "proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                used += sum(1 for _ in (process / "task").iterdir())
        except OSError:  # it has ended
            continue
    return max(0, limit - used)
