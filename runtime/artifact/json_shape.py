"""JSON text to a value of a declared type, checked field by field; one error that names the place.

The types are dataclasses and TypedDicts, their limits `Annotated[..., msgspec.Meta(...)]`. Knows none of them.
"""

import math
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtime.errors import InvalidArtifact

T = TypeVar("T")

MAX_BYTES = 64 << 20
"""Of a JSON file that is read whole. The longest of ours, the receipt of a deep model, has about 1 MB."""


def read_json(file: Path) -> Any:
    """The content of a JSON file. InvalidArtifact if it cannot be read, is too long or is not JSON."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InvalidArtifact(f"{file} has more than {MAX_BYTES >> 20} MiB: not a file of an export")
        return parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise InvalidArtifact(f"{file} cannot be read: {error.strerror or error}") from error


def parse_json(text: bytes | str, where: str) -> Any:
    """The value that JSON text stands for. InvalidArtifact, naming `where`, if the text is not JSON."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidArtifact(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidArtifact(f"{where} is not JSON of an export: it is nested too deeply") from error


def finite(value: Any) -> Any:
    """The same with NaN and infinity as text: Python writes and reads them, but they are not JSON."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shaped(raw: Any, kind: type[T], where: str) -> T:
    """`raw` as a `kind`; nothing is converted. InvalidArtifact names the first field that is wrong, and what fits."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise InvalidArtifact(f"{where} is malformed: {error}") from error
