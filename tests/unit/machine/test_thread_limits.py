"""Threads for connections: one for each, or what the system leaves; in the files of both versions of cgroups."""

import logging
import os
import resource
from pathlib import Path

import pytest

from serve.process.thread_limits import LEAST_THREADS, OTHER_THREADS, threads_for

SPARE = OTHER_THREADS + 2 * (os.cpu_count() or 1)


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("groups", "folder"),
    [
        ("0::/pod/app\n", "sys/fs/cgroup"),
        ("0::/pod/app\n", "sys/fs/cgroup/pod"),
        ("0::/pod/app\n", "sys/fs/cgroup/pod/app"),
        ("8:pids:/pod/app\n4:memory:/other\n", "sys/fs/cgroup/pids/pod"),
        ("3:cpu,pids:/pod\n", "sys/fs/cgroup/pids/pod"),
    ],
)
def test_the_least_limit_of_all_groups_around_this_process_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, groups: str, folder: str
) -> None:
    write(tmp_path, "proc/self/cgroup", groups)
    write(tmp_path, "sys/fs/cgroup/pod/other/pids.max", "1\n")
    write(tmp_path, "sys/fs/cgroup/pod/other/pids.current", "1\n")
    write(tmp_path, f"{folder}/pids.max", "max\n")
    write(tmp_path, f"{folder}/pids.current", "30\n")
    assert threads_for(4096, tmp_path) == 4096
    assert not caplog.records
    write(tmp_path, f"{folder}/pids.max", "1024\n")
    with caplog.at_level(logging.WARNING):
        assert threads_for(4096, tmp_path) == 1024 - 30 - SPARE
    (line,) = caplog.records
    assert "4096 connections" in line.getMessage() and "leaves 994 threads" in line.getMessage()
    assert threads_for(100, tmp_path) == 100
    write(tmp_path, f"{folder}/pids.max", "31\n")
    assert threads_for(4096, tmp_path) == LEAST_THREADS


def test_the_limit_of_a_user_counts_all_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        write(tmp_path, f"proc/7/task/{number}/stat", "")
    user = (tmp_path / "proc/7").stat().st_uid
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 2000))
    monkeypatch.setattr(os, "getuid", lambda: user)
    # Root has no such limit.
    assert threads_for(4096, tmp_path) == (4096 if user == 0 else 960 - SPARE)
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert threads_for(4096, tmp_path) == 1000 - SPARE, "of another user's nothing is counted"


def test_this_machine_has_room() -> None:
    assert threads_for(16) > 0
