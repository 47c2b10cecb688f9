"""Write an artifact so that half of one can never be loaded: into a hidden directory beside it, renamed when whole.

A reader accepts a directory only with a manifest that lists every file; the manifest is written last, and synced.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runtime.artifact import MANIFEST, FileEntry, Manifest, sha256_of
from runtime.errors import HeadraceError, InvalidSetting

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew beyond what is allowed here (see `ulimit -f`)",
}

_STAGING = ".{name}.partial-{pid}"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory; on success it replaces `target`, on any exception it is removed.

    InvalidSetting if `target` is something other than an artifact or an empty directory. A full disk is a
    HeadraceError that says so.
    """
    _check_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        staging = target.parent / _STAGING.format(name=target.name, pid=os.getpid())
        staging.mkdir()
    except OSError as error:
        raise InvalidSetting(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield staging
        _sync(staging)
        _replace(staging, target)
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(target.parent).free
            raise HeadraceError(
                f"{_FULL[error.errno]}: {target.parent} had {free / 1e6:,.0f} MB left when writing failed; "
                "nothing was changed"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    """Write manifest.json."""
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidSetting(f"{target} is a file; name another --out")
    if any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InvalidSetting(
            f"{target} holds something that is not an artifact; name another --out, or empty it yourself"
        )


def _remove_stale(target: Path) -> None:
    """Remove what killed exports to the same target left behind."""
    for left in target.parent.glob(_STAGING.format(name=target.name, pid="*")):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
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
    """Rename over the target; an older artifact steps aside first and is removed last."""
    if not target.exists():
        staging.rename(target)
        return
    old = staging.with_name(staging.name + ".old")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
