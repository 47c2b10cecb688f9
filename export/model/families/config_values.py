"""Reads and checks single values of config.json: integers, numbers, switches, token ids.

A missing field has its family's default. A null field has it only if transformers allows null. Every error is an
InvalidCheckpoint that names the field, the value and the valid values.
"""

from collections.abc import Mapping
from typing import Any

from export.checkpoint.config_fields import shown
from runtime.errors import InvalidCheckpoint

MAX_SIZE = (1 << 31) - 1
"""Limit of any dimension: far above every model, and the product of two fits in a 64-bit file length."""


def integer(
    raw: Mapping[str, Any],
    name: str,
    default: int,
    *,
    minimum: int = 1,
    maximum: int = MAX_SIZE,
    inside: str = "",
) -> int:
    """An integer; `inside` names the object that `raw` is, if it is not config.json itself."""
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        source = "" if name in raw else " (the family's default)"
        raise InvalidCheckpoint(
            f"config.json: {_path(name, inside)} must be an integer from {minimum:,} to {maximum:,}, got {shown(value)}"
            f"{source}"
        )
    return value


def number(raw: Mapping[str, Any], name: str, default: float | None = None, *, inside: str = "") -> float:
    """A positive, finite number; required without a default. `inside` as in `integer`."""
    value: Any = raw.get(name, default)
    # The bound excludes infinity, and integers that a float cannot represent.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
        raise InvalidCheckpoint(f"config.json: {_path(name, inside)} must be a positive number, got {shown(value)}")
    return float(value)


def _path(name: str, inside: str) -> str:
    return f"{inside}.{name}" if inside else name


def optional_number(raw: Mapping[str, Any], name: str, *, inside: str = "") -> float | None:
    """A positive, finite number; None if it is missing, null or 0, which all mean "not set"."""
    value = raw.get(name)
    is_unset = value is None or (value == 0 and value is not False)
    return None if is_unset else number(raw, name, inside=inside)


def share(raw: Mapping[str, Any], name: str, default: float = 1) -> float:
    """A number above 0 and at most 1. transformers 5 writes it to rope_parameters."""
    nested = raw.get("rope_parameters")
    inner = nested.get(name) if isinstance(nested, dict) else None
    value = number({name: raw[name] if raw.get(name) is not None else default if inner is None else inner}, name)
    if value > 1:
        raise InvalidCheckpoint(f"config.json: {name} must be at most 1, got {value:g}")
    return value


def flag(raw: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A boolean; null means its default."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidCheckpoint(f"config.json: {name} must be true or false, got {shown(value)}")
    return value


def token_ids(value: object, name: str, *, vocab_size: int) -> tuple[int, ...]:
    """Token ids from one id, a list of them, or null; `name` is the file and field, for errors."""
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise InvalidCheckpoint(f"{name} must be a token id or a list of them, got {shown(value)}")
    outside = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if outside:
        raise InvalidCheckpoint(
            f"{name} {shown(outside[0])} is outside the vocabulary of {vocab_size:,} tokens (0 to {vocab_size - 1:,}); "
            "it belongs to another model, or the embedding was not resized: correct the field"
        )
    return tuple(ids)
