"""How much memory is free: what the kernel says, or the control groups around this process if they leave less."""

from collections.abc import Iterator
from pathlib import Path

from runtime.errors import InvalidSetting
from runtime.machine.control_groups import control_group_paths, read_number


def available_memory(root: Path = Path("/")) -> int:
    """Free bytes: MemAvailable of /proc/meminfo, or what the control group leaves, if that is less."""
    meminfo = root / "proc/meminfo"
    try:
        lines = meminfo.read_text().splitlines()
    except OSError as error:
        raise InvalidSetting(f"{meminfo} cannot be read ({error.strerror}); say how much with --kv-memory") from error
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "MemAvailable" not in fields:
        raise InvalidSetting(f"{meminfo} has no MemAvailable; say how much memory to use with --kv-memory")
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *_cgroup_room(root), 2**62)


def _cgroup_room(root: Path) -> Iterator[int]:
    """Limit minus use for each control group around this process that has a limit."""
    for group in control_group_paths(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = read_number(group / limit_name), read_number(group / used_name)
            if limit is not None and used is not None:
                yield max(0, limit - used + _reclaimable(group))


def _reclaimable(group: Path) -> int:
    """Bytes of page cache that the kernel drops before it runs out."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(stat.get("inactive_file", 0))
