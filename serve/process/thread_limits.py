"""How many threads this process may have for its connections: fewer than the system allows, so that none is refused.

Containers limit tasks (`pids.max` of a control group: docker --pids-limit, podPidsLimit of Kubernetes), logins do
(`ulimit -u`). A limit that is met is met by whatever starts a thread next, the model's library included.
"""

import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from runtime.machine.control_groups import control_group_paths, read_number

LEAST_THREADS = 8
"""Even where there is no room: then a connection may find no thread, and is closed."""
OTHER_THREADS = 64
"""Besides one a core for each of two models: engines, masks, grammars, traces, drains, a helper process."""

log = logging.getLogger(__name__)


def threads_for(num_connections: int, root: Path = Path("/")) -> int:
    """Threads for so many connections, as far as the system has room; a warning says so if that is fewer.

    `root` is where /proc and /sys are found.
    """
    rooms = [room for room in (*_group_rooms(root), _user_room(root)) if room is not None]
    spare = OTHER_THREADS + 2 * (os.cpu_count() or 1)
    num_threads = min(num_connections, max(LEAST_THREADS, min(rooms, default=num_connections + spare) - spare))
    if num_threads < num_connections:
        log.warning(
            "only %d requests are answered at once, not one for each of %d connections: the system leaves %d threads "
            "(pids.max, ulimit -u), %d of them for other work",
            *(num_threads, num_connections, min(rooms), spare),
        )
    return num_threads


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group around this process leaves."""
    for group in control_group_paths(root, "pids"):
        limit, used = read_number(group / "pids.max"), read_number(group / "pids.current")
        if limit is not None and used is not None:
            yield max(0, limit - used)


def _user_room(root: Path) -> int | None:
    """What `ulimit -u` leaves, which counts all threads of the user; None without a limit, and for root."""
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
