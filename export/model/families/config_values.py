"""Single values out of config.json, checked: integers, numbers, switches, token ids.

A field that is missing has its family's default; one that is null has it only where transformers allows null. Every
error is an InvalidCheckpoint that names the field, the value and what is valid.
"""

from collections.abc import Mapping
from typing import Any

from export.checkpoint.config_fields import shown
from runtime.errors import InvalidCheckpoint

MAX_SIZE = (1 << 31) - 1
"""Of any dimension: far beyond every model, small enough that no size computed from two overflows a file's length."""


def integer(
    raw: Mapping[str, Any],
    name: str,
    default: int,
    *,
    minimum: int = 1,
    maximum: int = MAX_SIZE,
    field: str | None = None,
) -> int:
    """An integer. `field` is its full name for errors, where it stands inside an object."""
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        source = "" if name in raw else " (the family's default)"
        raise InvalidCheckpoint(
            f"config.json: {field or name} must be an integer from {minimum:,} to {maximum:,}, got {shown(value)}"
            f"{source}"
        )
    return value


def number(raw: Mapping[str, Any], name: str, default: float | None = None, *, field: str | None = None) -> float:
    """A positive, finite number; required without a default. `field` as above."""
    value: Any = raw.get(name, default)
    # The bound keeps an integer of 400 digits from overflowing, and infinity out.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
        raise InvalidCheckpoint(f"config.json: {field or name} must be a positive number, got {shown(value)}")
    return float(value)


def optional_number(raw: Mapping[str, Any], name: str, *, field: str) -> float | None:
    """A positive, finite number; None if it is missing, null or 0, which all mean "not set"."""
    value = raw.get(name)
    is_unset = value is None or (value == 0 and value is not False)
    return None if is_unset else number(raw, name, field=field)


def share(raw: Mapping[str, Any], name: str) -> float:
    """A share above 0 and at most 1; 1 if it is missing. transformers 5 writes it into rope_parameters."""
    nested = raw.get("rope_parameters")
    inner = nested.get(name) if isinstance(nested, dict) else None
    value = number({name: raw[name] if raw.get(name) is not None else 1 if inner is None else inner}, name)
    if value > 1:
        raise InvalidCheckpoint(f"config.json: {name} must be at most 1, got {value:g}")
    return value


def flag(raw: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A switch; null is its default."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidCheckpoint(f"config.json: {name} must be true or false, got {shown(value)}")
    return value


def token_ids(value: object, name: str, *, vocab_size: int) -> tuple[int, ...]:
    """One token id, a list of them, or null; `name` is the file and field, for errors."""
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise InvalidCheckpoint(f"{name} must be a token id or a list of them, got {shown(value)}")
    outside = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if outside:
        raise InvalidCheckpoint(
            f"{name} {shown(outside[0])} is outside the vocabulary of {vocab_size:,} tokens (0 to {vocab_size - 1:,}); "
            "it belongs to another model, or the embedding was not resized: mend the field"
        )
    return tuple(ids)
