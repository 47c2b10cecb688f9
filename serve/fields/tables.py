"""Checks a JSON object against a table with one row per field. Knows nothing of OpenAI or of models.

A row names the field, its class and the check of its value. A check returns the value, perhaps in another shape, or
raises `MismatchError` with what would be valid; the table's reader adds the field's name and the value found.
As in OpenAI's API null counts as absent. A row is of one of three classes:

    honoured   Field(name, check)             the value is checked and returned
    taken      taken(name, why)               no token depends on it: any value passes, and the name is noted
    refused    refused(name, why, *neutral)   the answer would not be what was asked for: only null and values that ask
                                              for nothing pass (and are noted); any other is an UnsupportedField

A name without a row is noted too, or refused while `reading(is_strict=True)`. Who calls `reading` gets the notes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runtime.errors import InvalidRequest, UnknownField, UnsupportedField

SHOWN_CHARS = 60
MAX_NOTED = 200
"""Of the names that a client may invent, what one request can make the server keep."""
INDEX = re.compile(r"\[\d+\]")
INT_BOUND = 2**63
Check = Callable[[Any], Any]
Json = dict[str, Any]


class MismatchError(Exception):
    """A value that is not what its check wants; the message completes "NAME must be ..."."""


class FieldClass(StrEnum):
    """What a server does with a field; the module's docstring says what each means."""

    HONOURED = "honoured"
    TAKEN = "taken without effect"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One row: the field's name in JSON, the check of its value, whether it may be left out, and its class."""

    name: str
    check: Check
    is_required: bool = False
    kind: FieldClass = FieldClass.HONOURED


@dataclass(slots=True)
class Notes:
    """What is noted while the fields of one request are read. `ignored`: paths without indices (`messages[].name`)."""

    is_strict: bool = False
    ignored: dict[str, None] = field(default_factory=dict)
    """A dictionary for its order: the names as they came, each once."""


_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def reading(*, is_strict: bool = False) -> Iterator[Notes]:
    """Note what `read_fields` takes without effect inside this block; with `is_strict` unknown names are refused."""
    notes = Notes(is_strict)
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note_ignored(path: str) -> None:
    """Note that a field was taken without effect. At most MAX_NOTED names are kept."""
    notes = _notes.get()
    if notes is not None and len(notes.ignored) < MAX_NOTED:
        notes.ignored[INDEX.sub("[]", path)] = None


def described(**schema: Any) -> Callable[[Check], Check]:
    """Give a check the JSON schema of what it takes; the API's own description is made of these
    (serve/api/openapi.py).
    """

    def describe(check: Check) -> Check:
        check.schema = schema  # type: ignore[attr-defined]  # functions take attributes, their type does not say so
        return check

    return describe


def schema_of(check: Check) -> Json:
    """The schema a check was given; one that takes everything, with the check's own words, if none."""
    if (schema := getattr(check, "schema", None)) is not None:
        return dict(schema)
    words = (check.__doc__ or "").partition("\n")[0]
    return {"description": words} if words else {}


def table_schema(table: Sequence[Field]) -> Json:
    """The schema of an object that `read_fields` takes with this table. A field that may be absent may be null."""
    properties = {row.name: schema_of(row.check) for row in table}
    required = [row.name for row in table if row.is_required]
    return {
        "type": "object",
        "properties": {name: value if name in required else or_null(value) for name, value in properties.items()},
        **({"required": required} if required else {}),
        "additionalProperties": True,
    }


def or_null(schema: Json) -> Json:
    """The same schema, and null."""
    if not schema.keys() - {"description"}:
        return schema
    if "enum" in schema:
        return schema if None in schema["enum"] else schema | {"enum": [*schema["enum"], None]}
    if (kind := schema.get("type")) is not None:
        return schema | {"type": [*([kind] if isinstance(kind, str) else kind), "null"]}
    return schema | {"anyOf": [*schema.get("anyOf", []), {"type": "null"}]}


def read_object(text: bytes) -> dict[str, Any]:
    """Parse a request body: strict JSON in UTF-8 with an object at the top; a byte order mark before it is left out.

    NaN and Infinity, which Python's parser lets through, are refused. Raises InvalidRequest.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {shown(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def read_fields(raw: Mapping[str, Any], table: Sequence[Field], path: str = "") -> dict[str, Any]:
    """Check every field of `raw`; return those honoured that are there and not null, as their checks returned them.

    `path` is put before names in messages (`messages[0].`). Raises InvalidRequest, UnsupportedField, UnknownField.
    """
    known = {row.name for row in table}
    for name, value in raw.items():
        if name not in known:
            _read_unknown(name, value, known, path)
    values = {}
    for row in table:
        value = raw.get(row.name)
        if row.kind is not FieldClass.HONOURED:
            if row.name in raw:
                _read_ignored(row, value, path)
        elif value is not None:
            values[row.name] = check_value(value, row.check, path + row.name)
        elif row.is_required:
            raise InvalidRequest(f"{path}{row.name} is required", param=path + row.name)
    return values


def _read_unknown(name: str, value: Any, known: set[str], path: str) -> None:
    notes = _notes.get()
    if notes is not None and notes.is_strict and value is not None:
        valid = ", ".join(sorted(known))
        raise UnknownField(f"unknown field {path}{shown(name)}; valid fields: {valid}", param=path + name[:SHOWN_CHARS])
    note_ignored(path + name[:SHOWN_CHARS])


def _read_ignored(row: Field, value: Any, path: str) -> None:
    if value is not None:
        try:
            row.check(value)
        except MismatchError as mismatch:
            where = path + row.name
            raise UnsupportedField(f"{where} must be {mismatch}, got {shown(value)}", param=where) from None
    note_ignored(path + row.name)


def check_value(value: Any, check: Check, path: str) -> Any:
    """Run one check; InvalidRequest names the path and the value found."""
    try:
        return check(value)
    except MismatchError as mismatch:
        raise InvalidRequest(f"{path} must be {mismatch}, got {shown(value)}", param=path) from None


def shown(value: Any) -> str:
    """A value as an error message quotes it: scalars as JSON, cut short; containers by kind and size."""
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
    """An integer of at most 64 bits. Python's true is an int, JSON's is not; JSON's 1.0 is one, Python's is not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= INT_BOUND:
        raise MismatchError("an integer")
    return value


@described(type="number")
def number(value: Any) -> float:
    """A finite number: 1e999 parses to infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MismatchError("a number")
    if (isinstance(value, int) and abs(value) >= INT_BOUND) or not math.isfinite(value):
        raise MismatchError("a finite number")
    return value


@described(type="string")
def string(value: Any) -> str:
    """Text that UTF-8 can carry: JSON can smuggle in half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        raise MismatchError("a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MismatchError("text without lone surrogates") from None
    return value


def check_utf8(value: Any) -> None:
    """MismatchError if a string anywhere inside JSON is none that UTF-8 can carry."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MismatchError("JSON without lone surrogates") from None
    except RecursionError:
        raise MismatchError("JSON that is nested less deeply") from None


@described(type="object")
def any_object(value: Any) -> dict[str, Any]:
    """An object whose fields are checked elsewhere, if at all."""
    if not isinstance(value, dict):
        raise MismatchError("an object")
    return value


def between(low: int, high: int) -> Check:
    """An integer with both bounds included."""

    @described(type="integer", minimum=low, maximum=high)
    def check(value: Any) -> int:
        if not low <= (found := integer(value)) <= high:
            raise MismatchError(f"at least {low} and at most {high}")
        return int(found)

    return check


def one_of(*valid: Any) -> Check:
    """One of a few JSON values; the type counts, so 1 is not true."""

    @described(enum=list(valid))
    def check(value: Any) -> Any:
        if not any(type(value) is type(item) and value == item for item in valid):
            raise MismatchError(" or ".join(json.dumps(item) for item in valid))
        return value

    return check


def list_of(check: Check, what: str, *, max_len: int) -> Check:
    """A list whose items all pass `check`, returned as a tuple. `what` names the items in the plural."""

    @described(type="array", items=schema_of(check), maxItems=max_len)
    def check_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise MismatchError(f"a list of {what}")
        if len(value) > max_len:
            raise MismatchError(f"a list of at most {max_len} {what}")
        try:
            return tuple(check(item) for item in value)
        except MismatchError as mismatch:
            raise MismatchError(f"a list of {what}, each {mismatch}") from None

    return check_list


def taken(name: str, why: str) -> Field:
    """A row of a field on which no token depends. `why` completes "taken without effect: "."""

    @described(description=f"Taken without effect: {why}.")
    def check(value: Any) -> Any:
        return value

    return Field(name, check, kind=FieldClass.TAKEN)


def refused(name: str, why: str, *neutral: Any) -> Field:
    """A row of a field that cannot be honoured: only null and the neutral values, which ask for nothing, pass."""

    @described(enum=[*neutral, None], description=f"Not supported ({why}): only values that ask for nothing.")
    def check(value: Any) -> Any:
        if not any(_is_same(value, item) for item in neutral):
            options = "".join(f" or {json.dumps(item)}" for item in neutral)
            raise MismatchError(f"absent{options} ({why})")
        return value

    return Field(name, check, kind=FieldClass.REFUSED)


def _is_same(value: Any, item: Any) -> bool:
    """Equality of JSON: 1 is 1.0, but not true."""
    return isinstance(value, bool) == isinstance(item, bool) and bool(value == item)
