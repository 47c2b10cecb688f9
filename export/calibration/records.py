"""Reads calibration records from the user's .jsonl, .txt and .parquet files, as a stream.

A record is a conversation or a piece of text of bounded length. Every problem with a file is a one-line
InvalidSetting that names the file and the line or row. Knows nothing about tokens or samples.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InvalidSetting
from runtime.machine.progress import progress_bar
from runtime.text.text_file import check_readable, pieces_of

FLAG = "--calibration-text"

MAX_LINE_BYTES = 1 << 24
"""Longest line of a .jsonl file, since a line is held in memory whole. A book is a tenth of it."""

TEXT_COLUMNS = ("messages", "text", "content")
"""Fields that hold a record's text, the most preferred first: conversations, then plain text."""

_ROWS_AT_ONCE = 64

# The library prefetches the column chunks of all row groups: 240 MB of memory for a file of 180 MB, 120 MB for one of
# 26 MB. With these settings it takes 54 and 50 MB, at the same speed.
_FRUGAL = {"pre_buffer": False, "buffer_size": 1 << 20}


@dataclass(frozen=True, slots=True)
class Record:
    """`value` is `{"messages": [{"role", "content"}...]}` or `{"text"}`; `where` is for messages: file and line."""

    value: Mapping[str, Any]
    where: str = ""

    @property
    def num_chars(self) -> int:
        if "text" in self.value:
            return len(self.value["text"])
        return sum(len(message["content"]) for message in self.value["messages"])


def read_records(file: Path, *, piece_chars: int) -> Iterator[Record]:
    """Every record of a file, in order. Texts longer than `piece_chars` come in pieces, conversations are cut.

    At most one line, one batch of rows or a few pieces are in memory. InvalidSetting for a suffix that is not read.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise InvalidSetting(f"{FLAG} {file} does not end in {', '.join(_READERS)}; rename or convert it")
    check_readable(file, flag=FLAG)
    for record in reader(file, piece_chars):
        yield from _bounded(record, piece_chars)


def _read_jsonl(file: Path, piece_chars: int) -> Iterator[Record]:
    with progress_bar(f"read {file.name}", total=file.stat().st_size, unit="B") as bar, file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            bar.update(len(line))
            where = f"{file}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise InvalidSetting(f"{FLAG} {where}: the line is longer than {MAX_LINE_BYTES:,} bytes; split it")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _checked(_parsed(line, where), where)


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidSetting(
            f"{FLAG} {where} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}; convert the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidSetting(f"{FLAG} {where} is not JSON: {error}; each line must be one JSON object") from error


def _read_txt(file: Path, piece_chars: int) -> Iterator[Record]:
    with progress_bar(f"read {file.name}", total=file.stat().st_size, unit="B") as bar:
        for piece in pieces_of(file, piece_bytes=piece_chars, flag=FLAG):
            bar.update(len(piece.encode()))
            yield Record({"text": piece.removeprefix("\ufeff")}, str(file))


def _read_parquet(file: Path, piece_chars: int) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidSetting(
            f"{FLAG} {file}: Parquet needs the pyarrow package; pip install 'headrace[parquet]', or give .jsonl"
        ) from error
    try:
        table = parquet.ParquetFile(file, **_FRUGAL)
        column = next((name for name in TEXT_COLUMNS if name in table.schema_arrow.names), None)
        if column is None:
            raise InvalidSetting(
                f"{FLAG} {file} has no column called {', '.join(TEXT_COLUMNS)}; it has "
                f"{', '.join(table.schema_arrow.names) or 'none at all'}: rename the one with the text"
            )
        with progress_bar(f"read {file.name}", total=table.metadata.num_rows, unit="row") as bar:
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if value is not None:
                        where = f"{file}, row {number}"
                        yield _checked({column: value}, where)
                bar.update(batch.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        summary = " ".join(str(error).split())
        raise InvalidSetting(
            f"{FLAG} {file} cannot be read as Parquet: {summary}; download or write it again"
        ) from error


_READERS: Mapping[str, Callable[[Path, int], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _checked(value: Any, where: str) -> Record:
    """The record in the form the encoder takes, or InvalidSetting with what is missing."""
    if not isinstance(value, dict):
        raise InvalidSetting(
            f"{FLAG} {where} holds a {type(value).__name__}; it must be an object with messages or text"
        )
    column = next((name for name in TEXT_COLUMNS if name in value), None)
    if column is None:
        found = ", ".join(map(repr, list(value)[:8])) or "nothing"
        raise InvalidSetting(f"{FLAG} {where} has none of {', '.join(TEXT_COLUMNS)}; it has {found}")
    if column != "messages":
        text = value[column]
        if not isinstance(text, str):
            raise InvalidSetting(f"{FLAG} {where}: {column} is a {type(text).__name__}; it must be a string")
        _check_unicode(text, where)
        return Record({"text": text}, where)
    return Record({"messages": _checked_messages(value["messages"], where)}, where)


def _checked_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidSetting(f"{FLAG} {where}: messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidSetting(f"{FLAG} {where}: message {number} must have role and content, both strings")
        _check_unicode(content, where)
        checked.append({"role": role, "content": content})
    return checked


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell half a character (a lone surrogate); no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidSetting(
            f"{FLAG} {where} has a lone surrogate at character {error.start}, which is no valid Unicode; remove it"
        ) from error


def _bounded(record: Record, piece_chars: int) -> Iterator[Record]:
    if "messages" in record.value:
        yield _cut_conversation(record, piece_chars)
        return
    text = record.value["text"]
    start = 0
    while start < len(text):
        end = start + piece_chars
        # Between words if there is a space in the last half, so that no token is cut in two.
        if end < len(text) and (space := text.rfind(" ", start + piece_chars // 2, end + 1)) > 0:
            end = space
        piece = text[start:end]
        if piece.strip():
            yield Record({"text": piece}, record.where)
        start = end


def _cut_conversation(record: Record, piece_chars: int) -> Record:
    """The beginning of a conversation. The rest would not fit the sequence in any case."""
    if record.num_chars <= piece_chars:
        return record
    kept, room = [], piece_chars
    for message in record.value["messages"]:
        kept.append({**message, "content": message["content"][:room]})
        room -= len(message["content"])
        if room <= 0:
            break
    return Record({"messages": kept}, record.where)
