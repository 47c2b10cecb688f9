"""Reads the protobuf wire format. The serving side has no onnx package, and needs little of an ONNX file."""

from collections.abc import Iterator
from typing import NamedTuple

LENGTH_DELIMITED = 2


class Field(NamedTuple):
    """One field of a protobuf message."""

    number: int
    whole: bytes
    """Key, length and content, as in the file."""
    content: bytes | None
    """Of a string or message; None for numbers."""


def fields_of(message: bytes) -> Iterator[Field]:
    """The fields of a protobuf message in order. ValueError if it is not a whole one."""
    position = 0
    while position < len(message):
        start = position
        key, position = _varint(message, position)
        content = None
        if key & 7 == LENGTH_DELIMITED:
            length, position = _varint(message, position)
            content = message[position : position + length]
            position += length
        elif key & 7 == 0:
            _, position = _varint(message, position)
        elif key & 7 in (1, 5):
            position += 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {key & 7} at byte {start}")
        if position > len(message):
            raise ValueError(f"not a whole protobuf message: it ends inside the field at byte {start}")
        yield Field(key >> 3, message[start:position], content)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
    raise ValueError("not a whole protobuf message: it ends inside a number")
