"""Reads the head of a .gguf file: metadata, and the place of each tensor.

Knows the file format and nothing of models. The `gguf` library's own reader is slower (4 s for a 135M model, 0.2 s
here) and reads past the end of a corrupt file. Type numbers and block sizes come from the library. Format, versions 2
and 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from export.checkpoint.texts.reading import LFS_POINTER, refuse_lfs_pointer
from runtime.errors import InvalidCheckpoint, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# Limits against corrupt or hostile files. The largest published heads have 30 MB, some 50 keys, 5,000 tensors and
# 800,000 strings.
MAX_HEAD_BYTES = 512 << 20
MAX_ENTRIES = 65_536
MAX_STRINGS = 4_000_000

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type to struct format; all little-endian."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Place of a tensor: `shape` in numpy's order (rows first), `offset` from the start of the file."""

    shape: tuple[int, ...]
    type_id: int
    """A gguf.GGMLQuantizationType number."""
    offset: int
    num_bytes: int


class GgufHeader(NamedTuple):
    """Every metadata value by key, every tensor by name, as the file has them. Arrays of numbers are numpy's."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(file: Path) -> GgufHeader:
    """Read the head of `file` and check that all its tensors lie inside.

    InvalidCheckpoint if it is not a GGUF file, truncated or corrupt; UnsupportedModel for a version, byte order or
    tensor type that is not supported.
    """
    try:
        with file.open("rb") as handle:
            return _read(_Cursor(file, handle))
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror or error}") from error


class _Cursor:
    """Reads values one after another, never past the end of the file."""

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self.file, self._handle = file, handle
        self.size = file.stat().st_size
        self.position = self._num_strings = 0

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.corrupt(f"{count:,} bytes are announced at byte {self.position:,} of {self.size:,}")
        self.position += count
        if self.position > MAX_HEAD_BYTES:
            raise self.corrupt(f"its metadata goes beyond {MAX_HEAD_BYTES:,} bytes")
        return self._handle.read(count)

    def refuse_lfs_pointer(self) -> None:
        """InvalidCheckpoint if the file is a Git LFS pointer. The position stays."""
        refuse_lfs_pointer(self._handle.read(len(LFS_POINTER)), self.file)
        self._handle.seek(self.position)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a string before byte {self.position:,} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.corrupt(f"value type {kind} at byte {self.position:,} is unknown")
        item_kind, count = self.number("I"), self.number("Q")
        if item_kind in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[item_kind]}")
            return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)
        if item_kind != _STRING:
            raise self.corrupt(f"an array at byte {self.position:,} holds values of type {item_kind}")
        self._num_strings += count
        if count > self.size or self._num_strings > MAX_STRINGS:
            raise self.corrupt(f"{count:,} strings are announced at byte {self.position:,}, of {MAX_STRINGS:,} at most")
        return [self.string() for _ in range(count)]

    def corrupt(self, reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self.file} is truncated or corrupt: {reason}; download or copy it again")


def _read(cursor: _Cursor) -> GgufHeader:
    cursor.refuse_lfs_pointer()
    if cursor.size < len(MAGIC) or cursor.bytes(len(MAGIC)) != MAGIC:
        raise InvalidCheckpoint(f"{cursor.file} is not a GGUF file: it does not begin with {MAGIC.decode()!r}")
    version = cursor.number("I")
    if version not in VERSIONS:
        is_swapped = version & 0xFFFF == 0
        what = "the other byte order" if is_swapped else f"GGUF version {version}"
        raise UnsupportedModel(f"{cursor.file} has {what}; supported: little-endian, versions 2 and 3")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    if max(num_tensors, num_values) > MAX_ENTRIES:
        raise cursor.corrupt(
            f"{num_tensors:,} tensors and {num_values:,} keys are announced, of {MAX_ENTRIES:,} at most"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise cursor.corrupt(f"{key} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.corrupt(f"general.alignment is {alignment!r}")
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise cursor.corrupt(f"tensor {name} is there twice")
        tensors[name] = _place(cursor, name, shape, type_id, data_start + offset)
    return GgufHeader(metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.number("I")
    if num_dims > MAX_DIMS:
        raise cursor.corrupt(f"tensor {name} has {num_dims} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(num_dims)]))
    return name, shape, cursor.number("I"), cursor.number("Q")


def _place(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError as error:
        raise UnsupportedModel(f"{cursor.file}: tensor {name} has the unknown type number {type_id}") from error
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block_size:
        raise cursor.corrupt(f"tensor {name} has shape {list(shape)}, and {kind.name} comes in rows of {block_size}")
    num_bytes = math.prod(shape) // block_size * block_bytes
    if offset + num_bytes > cursor.size:
        raise cursor.corrupt(f"tensor {name} ends at byte {offset + num_bytes:,}, and the file has {cursor.size:,}")
    return GgufTensor(shape, type_id, offset, num_bytes)
