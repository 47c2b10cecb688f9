"""Reads a UTF-8 text file in pieces of bounded size, cut where a tokenizer cuts too. Knows no tokenizer.

A piece ends after a lone line end between two non-spaces, else before a space that follows a non-space. (After an
empty line will not do: GPT-2 splits two line ends before a word, and joins them at the end of a text.) The
pre-tokenizers of byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) never join text over either place, so the pieces'
token ids are those of the whole text. SentencePiece writes its space before every piece: one token a piece more.
"""

import codecs
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import InvalidSetting

# Tokenizing takes some hundred bytes of memory a byte of text.
PIECE_BYTES = 1 << 18

_CUTS = (re.compile(r".*\S\n(?=\S)", re.DOTALL), re.compile(r".*\S(?= )", re.DOTALL))


def check_readable(file: Path, *, flag: str = "--text") -> None:
    """Raise InvalidSetting, naming `flag`, unless `file` is a regular file; a pipe cannot be read a second time."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise _unreadable(file, error, flag) from error
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InvalidSetting(f"{flag} {file} is {what}; give a regular file of UTF-8 text")


def pieces_of(file: Path, *, piece_bytes: int = PIECE_BYTES, flag: str = "--text") -> Iterator[str]:
    """The file's text, at most a few times `piece_bytes` at once, even without a line end.

    Raises InvalidSetting if it cannot be read, or with the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, offset = "", 0
    try:
        with file.open("rb") as stream:
            while raw := stream.read(piece_bytes):
                text = held + _decoded(decoder, raw, file, offset, flag)
                offset += len(raw)
                cut = _cut_of(text)
                yield text[:cut]
                held = text[cut:]
            _decoded(decoder, b"", file, offset, flag)
    except OSError as error:
        raise _unreadable(file, error, flag) from error
    if held:
        yield held


def _cut_of(text: str) -> int:
    """The position of the last possible cut; the end of the text if there is none."""
    for pattern in _CUTS:
        if found := pattern.match(text):
            return found.end()
    return len(text)


def _decoded(decoder: codecs.IncrementalDecoder, raw: bytes, file: Path, offset: int, flag: str) -> str:
    """Decode bytes that stand at `offset`; empty `raw` is the end of the file."""
    held = len(decoder.getstate()[0])  # bytes of a character that the last piece cut in two
    try:
        return decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        raise InvalidSetting(
            f"{flag} {file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{offset - held + error.start:,}; convert it first"
        ) from error


def _unreadable(file: Path, error: OSError, flag: str) -> InvalidSetting:
    return InvalidSetting(f"{flag} {file} cannot be read: {error.strerror}; give a file of UTF-8 text")
