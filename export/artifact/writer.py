"""Writes an artifact into a hidden directory beside its target and renames it when it is complete.

So a half-written artifact is never loaded. The manifest, without which no reader accepts a directory, comes last.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from export.artifact.identity import present_at
from export.storage.whole_file import explaining_full_disk, write_whole
from runtime.artifact.known_hashes import sha256_of
from runtime.artifact.manifest import MANIFEST, FileEntry, Manifest
from runtime.errors import InvalidSetting

_STAGING = ".{name}.partial-{pid}"
_ASIDE = ".old"
"""Suffix of the directory that holds the replaced artifact during the swap."""


@contextmanager
def staged(target: Path, *, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Yield an empty directory; on success it replaces `target`, on any exception it is removed.

    check: raises if what is at `target` must stay; called before anything is written, and again before the swap,
        because another export may have finished meanwhile
    InvalidSetting if `target` cannot be written, or is neither an artifact nor an empty directory. HeadraceError if the
    disk is full.
    """
    target = resolved(target)
    present_at(target)
    check()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(target)
        staging = target.parent / _STAGING.format(name=target.name, pid=os.getpid())
        staging.mkdir()
        lock = _locked(staging)
    except OSError as error:
        raise InvalidSetting(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        with explaining_full_disk(target.parent):
            yield staging
            _sync(staging)
            present_at(target)
            check()
            _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def resolved(target: Path) -> Path:
    """The real path of `target`, so that a symlink to it stays one. InvalidSetting for a circle of links."""
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for a circle
        raise InvalidSetting(f"--out {target} cannot be followed: {error}; name another") from error


def write_texts(directory: Path, files: Mapping[str, str]) -> None:
    """Write small text files, UTF-8."""
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def write_json(file: Path, value: object) -> None:
    """Write indented JSON; refuses NaN, which no other reader would take."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def file_entry(file: Path) -> FileEntry:
    """Size and hash of a file, for the manifest."""
    return FileEntry(size=file.stat().st_size, sha256=sha256_of(file))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, or replace the one that is there."""
    write_whole(directory / MANIFEST, manifest.to_json().encode())


def _locked(directory: Path) -> int:
    """Lock a directory until this process ends, however it ends. Returns the file descriptor."""
    handle = os.open(directory, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks: _is_abandoned then goes by the process id
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _is_abandoned(directory: Path) -> bool:
    """Whether the export that wrote a staging directory is gone."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not Path(f"/proc/{directory.name.rpartition('-')[2]}").exists()
    finally:
        os.close(handle)
    return True


def _clear_stale(target: Path) -> None:
    """Remove what killed exports to the same target left, and put back an artifact that one had moved aside."""
    pattern = re.compile(re.escape(_STAGING.format(name=target.name, pid="PID")).replace("PID", r"\d+"))
    for left in sorted(target.parent.iterdir()):
        staging = left.with_name(left.name.removesuffix(_ASIDE))
        if not pattern.fullmatch(staging.name) or not left.is_dir() or left.is_symlink():
            continue
        if staging.is_dir() and not _is_abandoned(staging):
            continue
        if left != staging and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Force the files and their names to disk before the rename makes them visible."""
    for path in (*directory.iterdir(), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(staging: Path, target: Path) -> None:
    """Rename over the target. An older artifact is moved aside first and removed last."""
    if not target.exists():
        staging.rename(target)
        return
    old = staging.with_name(staging.name + _ASIDE)
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:  # Ctrl-C between the two as well
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
