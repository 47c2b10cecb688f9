"""The control groups around this process: where the kernel keeps limits of memory and tasks, in both its versions."""

from collections.abc import Iterator
from pathlib import Path


def control_group_paths(root: Path, controller: str) -> Iterator[Path]:
    """Directories of this process's groups and their parents that may limit `controller` (memory, pids).

    The unified hierarchy (v2) first, then the controller's own (v1). `root` is where /proc and /sys are found.
    """
    own = list(_own_groups(root, controller))
    for top in (root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller):
        yield from (top, *(top / part for part in own))


def read_number(file: Path) -> int | None:
    """The number in a file; None if there is none (no such file, or the word `max`)."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _own_groups(root: Path, controller: str) -> Iterator[str]:
    """Paths of the groups and their parents, relative to the hierarchy's root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if (not controllers or controller in controllers.split(",")) and ".." not in path:
            parts = path.strip("/").split("/")
            yield from ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1) if parts[0])
