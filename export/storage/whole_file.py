"""Writes a file whole or not at all: under a temporary name, synced, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from runtime.errors import HeadraceError

PARTIAL = ".partial-"
"""Between a file's name and the process id while it is being written."""

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew beyond what is allowed here (see `ulimit -f`)",
}


@contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """Yield a handle to write to; `file` appears, or is replaced, at the end. On any exception nothing is left."""
    partial = file.with_name(f"{file.name}{PARTIAL}{os.getpid()}")
    try:
        with explaining_full_disk(file.parent), partial.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(file: Path, data: bytes) -> None:
    """Write the bytes in one go. HeadraceError if the disk is full."""
    with whole_file(file) as handle:
        handle.write(data)


@contextmanager
def explaining_full_disk(directory: Path) -> Iterator[None]:
    """Turn an OSError of a full disk into a HeadraceError with the space that is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(directory).free
        raise HeadraceError(
            f"{_FULL[error.errno]}: {directory} had {free / 1e6:,.0f} MB left when writing failed; nothing was changed"
        ) from error
