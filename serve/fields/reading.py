"""Reads a JSON object with a table that has one row for each field. Knows nothing of OpenAI or of models.

A row is of one of three classes. As in OpenAI's API, null counts as absent.

    supported   Field(name, check)             the value is checked and returned
    ignored     ignored(name, why)             no token depends on the field: any value passes, and the name is noted
    refused     refused(name, why, *neutral)   the answer would not be what the client asked for: UnsupportedField,
                                               except for null and values that ask for nothing, which are noted

A name without a row is noted as ignored, or refused inside `reading(is_strict=True)`, which collects the notes.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runtime.errors import InvalidRequest, UnknownField, UnsupportedField
from serve.fields.checks import SHOWN_CHARS, Check, Json, MismatchError, described, or_null, schema_of, shown

MAX_NOTED = 200
"""Bounds what one request can make the server keep: clients may invent names."""
INDEX = re.compile(r"\[\d+\]")


class FieldClass(StrEnum):
    """What the server does with a field; see the module's docstring."""

    SUPPORTED = "supported"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One row: the field's name in JSON, the check of its value, whether it is required, and its class."""

    name: str
    check: Check
    is_required: bool = False
    kind: FieldClass = FieldClass.SUPPORTED


@dataclass(slots=True)
class Notes:
    """What is noted while one request is read. `ignored`: paths without indices, like `messages[].name`."""

    is_strict: bool = False
    ignored: dict[str, None] = field(default_factory=dict)
    """A dictionary used as an ordered set."""


_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def reading(*, is_strict: bool = False) -> Iterator[Notes]:
    """Collect the fields that `read_fields` ignores inside this block. With `is_strict`, unknown names are refused."""
    notes = Notes(is_strict)
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note_ignored(path: str) -> None:
    """Note that a field was ignored. At most MAX_NOTED names are kept."""
    notes = _notes.get()
    if notes is not None and len(notes.ignored) < MAX_NOTED:
        notes.ignored[INDEX.sub("[]", path)] = None


def read_object(text: bytes) -> Json:
    """Parse a request body: a JSON object in UTF-8, perhaps after a byte order mark. Raises InvalidRequest.

    Refuses NaN and Infinity, which Python's parser accepts.
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


def read_fields(raw: Mapping[str, Any], rows: Sequence[Field], path: str = "") -> dict[str, Any]:
    """Check every field of `raw`; return the supported ones that are not null, as their checks returned them.

    `path` precedes names in messages, like `messages[0].`. Raises InvalidRequest, UnsupportedField, UnknownField.
    """
    known = {row.name for row in rows}
    for name, value in raw.items():
        if name not in known:
            _read_unknown(name, value, known, path)
    values = {}
    for row in rows:
        value = raw.get(row.name)
        if row.kind is not FieldClass.SUPPORTED:
            if row.name in raw:
                _read_unsupported(row, value, path)
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


def _read_unsupported(row: Field, value: Any, path: str) -> None:
    if value is not None:
        try:
            row.check(value)
        except MismatchError as mismatch:
            where = path + row.name
            raise UnsupportedField(f"{where} must be {mismatch}, got {shown(value)}", param=where) from None
    note_ignored(path + row.name)


def check_value(value: Any, check: Check, path: str) -> Any:
    """Run one check. Raises InvalidRequest with the path and the value if it does not pass."""
    try:
        return check(value, path) if getattr(check, "takes_path", False) else check(value)
    except MismatchError as mismatch:
        raise InvalidRequest(f"{path} must be {mismatch}, got {shown(value)}", param=path) from None


def at_path(**schema: Any) -> Callable[[Check], Check]:
    """Decorator like `described`, for a check of a value with parts: its second argument is the value's path."""

    def mark(check: Check) -> Check:
        check.takes_path = True  # type: ignore[attr-defined]  # functions have attributes, their type does not say so
        return described(**schema)(check)

    return mark


def object_of(rows: Sequence[Field], **schema: Any) -> Callable[[Callable[[Json, str], Any]], Check]:
    """Decorator: make a check of an object out of a function of the object's checked fields and its path."""

    def decorate(build: Callable[[Json, str], Any]) -> Check:
        @at_path(**table_schema(rows), **schema)
        def check(value: Any, path: str) -> Any:
            if not isinstance(value, dict):
                raise MismatchError("an object")
            return build(read_fields(value, rows, f"{path}."), path)

        return check

    return decorate


def fields_of(rows: Sequence[Field]) -> Check:
    """A check of an object that returns its fields."""
    return object_of(rows)(lambda found, _: found)


def table_schema(rows: Sequence[Field]) -> Json:
    """The JSON schema of an object with these rows. A field that may be absent may be null."""
    properties = {row.name: schema_of(row.check) for row in rows}
    required = [row.name for row in rows if row.is_required]
    return {
        "type": "object",
        "properties": {name: value if name in required else or_null(value) for name, value in properties.items()},
        **({"required": required} if required else {}),
        "additionalProperties": True,
    }


def ignored(name: str, why: str) -> Field:
    """A row of a field on which no token depends. `why` completes "Ignored: "."""

    @described(description=f"Ignored: {why}.")
    def check(value: Any) -> Any:
        return value

    return Field(name, check, kind=FieldClass.IGNORED)


def refused(name: str, why: str, *neutral: Any) -> Field:
    """A row of a field that is not supported. Only null and the neutral values, which ask for nothing, pass."""

    @described(enum=[*neutral, None], description=f"Not supported ({why}): only values that ask for nothing.")
    def check(value: Any) -> Any:
        if not any(_is_same(value, item) for item in neutral):
            options = "".join(f" or {json.dumps(item)}" for item in neutral)
            raise MismatchError(f"absent{options} ({why})")
        return value

    return Field(name, check, kind=FieldClass.REFUSED)


def _is_same(value: Any, item: Any) -> bool:
    """Equality as in JSON: 1 equals 1.0, but not true."""
    return isinstance(value, bool) == isinstance(item, bool) and bool(value == item)
