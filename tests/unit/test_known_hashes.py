"""Hashes of large files: computed once, and again as soon as anything about the file has changed."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from runtime.artifact import known_hashes
from runtime.artifact.known_hashes import FILE, MIN_AGE_S, known_sha256_of


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file old enough to be remembered, which counts as large."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "MIN_BYTES", 4)
    monkeypatch.setattr(time, "time", lambda: (tmp_path / "weights").stat().st_ctime + 2 * MIN_AGE_S)
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    return path


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole, in order."""
    read: list[Path] = []
    plain = known_hashes.sha256_of

    def counted(path: Path) -> str:
        read.append(path)
        return plain(path)

    monkeypatch.setattr(known_hashes, "sha256_of", counted)
    return read


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_an_unchanged_file_is_read_once(file: Path, num_read: list[Path]) -> None:
    assert known_sha256_of(file) == known_sha256_of(file) == sha256(b"12345")
    assert len(num_read) == 1
    small = file.with_name("small")
    small.write_bytes(b"1")
    assert known_sha256_of(small) == known_sha256_of(small) == sha256(b"1")
    assert len(num_read) == 3


@pytest.mark.parametrize("is_dated_back", [False, True])
def test_a_changed_file_is_read_again(file: Path, is_dated_back: bool) -> None:
    known_sha256_of(file)
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock ticks slowly
        file.write_bytes(b"54321")
        if is_dated_back:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_sha256_of(file) == sha256(b"54321")


def test_a_file_that_has_just_changed_is_not_remembered(
    file: Path, num_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: file.stat().st_ctime + MIN_AGE_S / 2)
    assert known_sha256_of(file) == known_sha256_of(file) == sha256(b"12345")
    assert len(num_read) == 2


def test_what_is_remembered_counts_only_if_nobody_else_can_write_it(file: Path, num_read: list[Path]) -> None:
    known_sha256_of(file)
    memory = file.parent / "cache" / FILE
    forged = dict.fromkeys(json.loads(memory.read_text()), "0" * 64)
    memory.write_text(json.dumps(forged))
    assert known_sha256_of(file) == "0" * 64  # what the user's own file says is believed
    memory.chmod(0o622)
    assert known_sha256_of(file) == sha256(b"12345")
    for malformed in ("", "[1]", '{"a": 1}', "\0"):
        memory.write_text(malformed)
        memory.chmod(0o600)
        assert known_sha256_of(file) == sha256(b"12345")
    assert len(num_read) == 6


def test_without_a_place_to_write_nothing_is_remembered(
    file: Path, num_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(file))
    assert known_sha256_of(file) == known_sha256_of(file) == sha256(b"12345")
    assert len(num_read) == 2


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        known_sha256_of(tmp_path / "nothing")
