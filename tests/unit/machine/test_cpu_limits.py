"""Threads of a model: physical cores, affinity, and the processor time of control groups in both versions."""

import os
from pathlib import Path

import pytest

from runtime.machine.cpu_limits import is_limited, model_threads, num_cores


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(root: Path, num_cores: int, threads_per_core: int = 1) -> range:
    """A machine whose hyperthreads are numbered as Linux does: first one of each core, then the second ones."""
    for core in range(num_cores):
        siblings = [core + num_cores * thread for thread in range(threads_per_core)]
        for cpu in siblings:
            name = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            write(root, name, ",".join(map(str, siblings)) + "\n")
    return range(num_cores * threads_per_core)


def test_hyperthreads_count_once(tmp_path: Path) -> None:
    cpus = machine(tmp_path, 8, threads_per_core=2)
    assert model_threads(tmp_path, cpus) == num_cores(tmp_path, cpus) == 8
    assert model_threads(tmp_path, [0, 8, 1]) == 2, "two threads of core 0, one of core 1"
    assert model_threads(tmp_path, [3]) == 1


def test_without_a_topology_each_processor_is_a_core(tmp_path: Path) -> None:
    assert model_threads(tmp_path, range(6)) == 6


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("140000 100000", 1),
        ("20000 100000", 1),
        ("1600000 100000", 8),
        ("50000 25000", 2),
        ("nonsense", 8),
    ],
)
@pytest.mark.parametrize("folder", ["sys/fs/cgroup", "sys/fs/cgroup/pod", "sys/fs/cgroup/pod/app"])
def test_the_quota_of_any_group_around_this_process_holds(
    tmp_path: Path, folder: str, quota: str, threads: int
) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/pod/app\n")
    write(tmp_path, "sys/fs/cgroup/other/cpu.max", "100000 100000\n")
    write(tmp_path, f"{folder}/cpu.max", quota + "\n")
    assert model_threads(tmp_path, machine(tmp_path, 8)) == threads


@pytest.mark.parametrize(("quota", "threads"), [(-1, 8), (300_000, 3), (250_000, 3), (10_000, 1)])
def test_the_quota_of_the_first_version(tmp_path: Path, quota: int, threads: int) -> None:
    write(tmp_path, "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/7\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/7/cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/7/cpu.cfs_period_us", "100000\n")
    assert model_threads(tmp_path, machine(tmp_path, 8)) == threads


def test_the_least_of_several_limits(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/pod/app\n")
    write(tmp_path, "sys/fs/cgroup/pod/cpu.max", "200000 100000\n")
    write(tmp_path, "sys/fs/cgroup/pod/app/cpu.max", "600000 100000\n")
    cpus = machine(tmp_path, 8)
    assert model_threads(tmp_path, cpus) == 2
    assert model_threads(tmp_path, [5]) == 1


def test_a_limit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = machine(tmp_path, 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
    assert not is_limited(tmp_path)
    write(tmp_path, "sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert not is_limited(tmp_path), "as much as there is"
    write(tmp_path, "sys/fs/cgroup/cpu.max", "300000 100000\n")
    assert is_limited(tmp_path)
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert is_limited(tmp_path)
