"""Hashes of large files, remembered in the user's cache, so that a weight file is not read whole at every start.

A hash counts only while device, inode, size and both times of the file are those at which it was computed. Nobody but
root can set a file's change time. Knows nothing of artifacts.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from runtime.machine.user_cache import cache_dir

FILE = "hashes.json"
MIN_BYTES = 16 * 2**20
"""Smaller files are read again: that takes at most 20 ms."""
MIN_AGE_S = 2.0
"""A file that changed less than this ago may change again without another time: clocks of file systems tick slowly."""
MAX_KNOWN = 256


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file, read once."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def known_sha256_of(file: Path) -> str:
    """The same, from memory if the file is known and unchanged. OSError if the file cannot be read."""
    state = file.stat()
    if state.st_size < MIN_BYTES:
        return sha256_of(file)
    key, path = _key(state), cache_dir() / FILE
    known = _read(path)
    if key not in known:
        found = sha256_of(file)
        if _key(file.stat()) != key or time.time() - state.st_ctime < MIN_AGE_S:
            return found
        known[key] = found
        _write(path, dict(list(known.items())[-MAX_KNOWN:]))
    return known[key]


def _key(state: os.stat_result) -> str:
    return ":".join(map(str, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)))


def _read(path: Path) -> dict[str, str]:
    """What is known; nothing if the file is missing, malformed, or can be written by other users."""
    try:
        with path.open(encoding="utf-8") as handle:
            state = os.fstat(handle.fileno())
            if state.st_uid != os.geteuid() or state.st_mode & 0o022:
                return {}
            found = json.load(handle)
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if is_sound else {}


def _write(path: Path, known: dict[str, str]) -> None:
    """Replace the file as a whole. Without a place to write nothing is remembered."""
    part = path.with_name(f"{FILE}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump(known, handle)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
