"""Reads small text and JSON files of a checkpoint, or says in one line why a file cannot be read.

Does not know what a file means. Skips a byte order mark, and recognizes a Git LFS pointer: the file was not downloaded.
"""

import json
import re
from pathlib import Path
from typing import Any

from runtime.errors import InvalidCheckpoint

AGAIN = "download or copy it again"

# A larger file is a mistake or an attack. The largest published tokenizer.json has some 35 MB, other JSON files at most
# 10 MB; parsed, JSON takes some 20 times the memory of its text.
MAX_TEXT_BYTES = 128 << 20
MAX_JSON_CHARS = 32 << 20

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_text(file: Path) -> str:
    """Read a UTF-8 file. InvalidCheckpoint for one that is not there, too large, not UTF-8, or a Git LFS pointer."""
    try:
        if not file.is_file():  # a pipe would be waited on forever
            raise InvalidCheckpoint(
                f"{file} is not a plain file" if file.exists() else f"{file.parent} has no {file.name}"
            )
        if (size := file.stat().st_size) > MAX_TEXT_BYTES:
            raise InvalidCheckpoint(
                f"{file} has {size:,} bytes, more than the {MAX_TEXT_BYTES:,} that a model's text file may have"
            )
        raw = file.read_bytes()
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror or error}") from error
    refuse_lfs_pointer(raw, file)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error}; {AGAIN}") from error


def refuse_lfs_pointer(head: bytes, file: Path | str) -> None:
    """InvalidCheckpoint if a file begins as a Git LFS pointer does."""
    if head.startswith(LFS_POINTER):
        raise InvalidCheckpoint(
            f"{file} is a Git LFS pointer, not the file itself: the repository was cloned without its large files; "
            "run `git lfs pull` in it, or download the file"
        )


def parse_json_object(text: str, where: Path | str) -> dict[str, Any]:
    """Parse a JSON object; InvalidCheckpoint, naming `where`, for anything else."""
    if len(text) > MAX_JSON_CHARS:
        raise InvalidCheckpoint(f"{where} has {len(text):,} characters, more than the {MAX_JSON_CHARS:,} that are read")
    if not text.strip():
        raise InvalidCheckpoint(f"{where} is empty; {AGAIN}, or remove it if the model has none")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidCheckpoint(f"{where} is not JSON: {error}; {AGAIN}") from error
    except RecursionError as error:
        raise InvalidCheckpoint(f"{where} is nested too deep to be read; {AGAIN}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{where} holds a {type(value).__name__}, not a JSON object; {AGAIN}")
    _refuse_surrogates(text, value, where)
    return value


def _refuse_surrogates(text: str, value: object, where: Path | str) -> None:
    """JSON can spell half a character, which cannot be written as UTF-8."""
    if not _SURROGATE.search(text):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise InvalidCheckpoint(f"{where} spells half a character (a lone surrogate), which is no text") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, or raise InvalidCheckpoint."""
    return parse_json_object(read_text(file), file)
