"""Checks of single JSON values: numbers, strings, lists, one of several words. Knows nothing of request fields.

A check takes a value from parsed JSON and returns it, perhaps converted. It raises `MismatchError` if the value is not
valid; the message completes "NAME must be ...". `described` gives a check its JSON schema, which serve/api/openapi.py
publishes.
"""

import json
import math
from collections.abc import Callable
from typing import Any

SHOWN_CHARS = 60
INT_BOUND = 2**63
Check = Callable[..., Any]
Json = dict[str, Any]


class MismatchError(Exception):
    """The value is not valid; the message completes "NAME must be ..."."""


def described(**schema: Any) -> Callable[[Check], Check]:
    """Decorator: give a check the JSON schema of the values it accepts."""

    def describe(check: Check) -> Check:
        check.schema = schema  # type: ignore[attr-defined]  # functions have attributes, their type does not say so
        return check

    return describe


def schema_of(check: Check) -> Json:
    """The JSON schema of a check. Without one, a schema that accepts everything, with the check's docstring."""
    if (schema := getattr(check, "schema", None)) is not None:
        return dict(schema)
    words = (check.__doc__ or "").partition("\n")[0]
    return {"description": words} if words else {}


def or_null(schema: Json) -> Json:
    """The same schema, which also accepts null."""
    if not schema.keys() - {"description"}:
        return schema
    if "enum" in schema:
        return schema if None in schema["enum"] else schema | {"enum": [*schema["enum"], None]}
    if (kind := schema.get("type")) is not None:
        return schema | {"type": [*([kind] if isinstance(kind, str) else kind), "null"]}
    return schema | {"anyOf": [*schema.get("anyOf", []), {"type": "null"}]}


def shown(value: Any) -> str:
    """A value as error messages quote it: scalars as JSON, cut short; objects and lists by their size."""
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= INT_BOUND:
        return "an integer beyond 64 bits"
    text = json.dumps(value[:SHOWN_CHARS] if isinstance(value, str) else value)
    return text if not isinstance(value, str) or len(value) <= SHOWN_CHARS else f'{text[:-1]}..."'


@described(type="boolean")
def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MismatchError("true or false")
    return value


@described(type="integer", minimum=1 - INT_BOUND, maximum=INT_BOUND - 1)
def integer(value: Any) -> int:
    """An integer of at most 64 bits. As in JSON, 1.0 is an integer and true is not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= INT_BOUND:
        raise MismatchError("an integer")
    return value


@described(type="number")
def number(value: Any) -> float:
    """A finite number. Python parses 1e999 as infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MismatchError("a number")
    if (isinstance(value, int) and abs(value) >= INT_BOUND) or not math.isfinite(value):
        raise MismatchError("a finite number")
    return value


@described(type="string")
def string(value: Any) -> str:
    """Text that UTF-8 can encode. JSON's escapes can contain half a surrogate pair, which tokenizers refuse."""
    if not isinstance(value, str):
        raise MismatchError("a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MismatchError("text without lone surrogates") from None
    return value


@described(type="string", minLength=1)
def some_text(value: Any) -> str:
    """Text that is not empty."""
    if not string(value):
        raise MismatchError("a string that is not empty")
    return str(value)


def check_utf8(value: Any) -> None:
    """Raise MismatchError if JSON contains a string that UTF-8 cannot encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MismatchError("JSON without lone surrogates") from None
    except RecursionError:
        raise MismatchError("JSON that is nested less deeply") from None


@described(type="object")
def any_object(value: Any) -> Json:
    """An object whose fields are not checked here."""
    if not isinstance(value, dict):
        raise MismatchError("an object")
    return value


def between(low: int, high: int) -> Check:
    """An integer from `low` to `high`, both included."""

    @described(type="integer", minimum=low, maximum=high)
    def check(value: Any) -> int:
        if not low <= (found := integer(value)) <= high:
            raise MismatchError(f"at least {low} and at most {high}")
        return int(found)

    return check


def text_up_to(max_chars: int) -> Check:
    """Text of 1 to `max_chars` characters."""

    @described(type="string", minLength=1, maxLength=max_chars)
    def check(value: Any) -> str:
        if not 0 < len(string(value)) <= max_chars:
            raise MismatchError(f"1 to {max_chars} characters")
        return str(value)

    return check


def one_of(*valid: Any) -> Check:
    """One of a few JSON values. The type counts: 1 is not true."""

    @described(enum=list(valid))
    def check(value: Any) -> Any:
        if not any(type(value) is type(item) and value == item for item in valid):
            raise MismatchError(" or ".join(json.dumps(item) for item in valid))
        return value

    return check


def list_of(check: Check, what: str, *, max_len: int, min_len: int = 0) -> Check:
    """A list whose items all pass `check`, returned as a tuple. `what` names the items in the plural."""
    length = f"{min_len} to {max_len}" if min_len else f"at most {max_len}"

    @described(type="array", items=schema_of(check), maxItems=max_len, **({"minItems": min_len} if min_len else {}))
    def check_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise MismatchError(f"a list of {what}")
        if not min_len <= len(value) <= max_len:
            raise MismatchError(f"a list of {length} {what}")
        try:
            return tuple(check(item) for item in value)
        except MismatchError as mismatch:
            raise MismatchError(f"a list of {what}, each {mismatch}") from None

    return check_list
