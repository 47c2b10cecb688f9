"""How many threads a model's runs get: one a physical core, or fewer where this process may use less of the machine.

Two limits count: the processors this process may run on (taskset, a cpuset, docker --cpuset-cpus), and the time a
control group grants (docker --cpus, limits.cpu of Kubernetes). More threads than granted time would be stopped together
for a part of each period, and a run waits for its last thread.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from runtime.machine.control_groups import control_group_paths, read_number

TOPOLOGY = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def model_threads(root: Path = Path("/"), allowed: Collection[int] | None = None) -> int:
    """Threads for a model by default.

    root: where /proc and /sys are found
    allowed: numbers of the processors that this process may run on, by default what the system says
    """
    cores = num_cores(root, allowed)
    granted = min(_granted_cpus(root), default=None)
    # A limit of 1.5 processors is better used by two threads, which wait a quarter of the time, than by one.
    return cores if granted is None else max(1, min(cores, int(granted + 0.5)))


def num_cores(root: Path = Path("/"), allowed: Collection[int] | None = None) -> int:
    """Physical cores that this process may run on; two hyperthreads are one core."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    return max(1, len({_core_of(root, cpu) for cpu in allowed}))


def is_limited(root: Path = Path("/")) -> bool:
    """Whether this process may use less than the whole machine."""
    return len(os.sched_getaffinity(0)) < (os.cpu_count() or 1) or any(
        granted < num_cores(root) for granted in _granted_cpus(root)
    )


def _core_of(root: Path, cpu: int) -> str:
    """A name that the hyperthreads of a core have in common."""
    try:
        return (root / TOPOLOGY.format(cpu)).read_text().strip()
    except OSError:
        return str(cpu)


def _granted_cpus(root: Path) -> Iterator[float]:
    """Processor seconds a second that each control group around this process grants, where there is a limit."""
    for group in control_group_paths(root, "cpu"):
        yield from _quota_v2(group / "cpu.max")
        quota, period = read_number(group / "cpu.cfs_quota_us"), read_number(group / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            yield quota / period


def _quota_v2(file: Path) -> Iterator[float]:
    """`max 100000` is no limit, `150000 100000` is one and a half processors."""
    try:
        quota, period = file.read_text().split()
    except (OSError, ValueError):
        return
    if quota != "max" and int(period) > 0:
        yield int(quota) / int(period)
