"""The fields that constrain an answer's form: OpenAI's `response_format`, vLLM's `structured_outputs`, and others.

Checks only the shape of the fields and returns a `Constraint`. `runtime/grammar/grammar.py` finds out whether a schema,
a regular expression or a grammar is valid. Knows nothing of HTTP.
"""

import json
from collections.abc import Mapping
from typing import Any

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.schema.translation import translate_schema
from serve.fields.checks import (
    Check,
    Json,
    MismatchError,
    boolean,
    described,
    list_of,
    one_of,
    schema_of,
    some_text,
    string,
)
from serve.fields.foreign import JSON_SCHEMA, RESPONSE_FORMAT, STRUCTURED, table
from serve.fields.reading import Field, at_path, fields_of, object_of

MAX_CHOICES = 5000
ANY_OBJECT = {"type": "object"}


@described(type=["object", "boolean"], description="A JSON schema.")
def any_schema(value: Any) -> Any:
    """A JSON schema: an object, or true. It is translated later, when `strict` is known."""
    if not isinstance(value, dict | bool):
        raise MismatchError("a JSON schema: an object")
    return value


@described(type=["object", "boolean", "string"], description="A JSON schema, or one as JSON text.")
def _schema_or_text(value: Any) -> Any:
    """vLLM accepts the schema as JSON text too."""
    if not isinstance(value, str):
        return any_schema(value)
    try:
        return any_schema(json.loads(string(value)))
    except (ValueError, RecursionError):
        raise MismatchError("a JSON schema: an object, or one as JSON text") from None


def schema_constraint(schema: Any, *, param: str, is_strict: bool = False) -> Constraint:
    """The constraint of a JSON schema. Raises InvalidRequest if it is invalid or cannot be enforced as asked."""
    found = translate_schema(schema, param=param, is_strict=is_strict)
    return Constraint(ConstraintKind.JSON_SCHEMA, found.source, param, late_checks=found.late_checks)


_strings = list_of(string, "strings", min_len=1, max_len=MAX_CHOICES)


@described(**schema_of(_strings))
def _choices(value: Any) -> str:
    return json.dumps(_strings(value))


JSON_SCHEMA_FIELDS = table(
    JSON_SCHEMA,
    Field("name", string),
    Field("schema", any_schema),
    Field("description", string),
    # Whether a keyword that a grammar cannot enforce is refused, or checked when the answer is complete.
    Field("strict", boolean),
)
RESPONSE_FORMAT_FIELDS = table(
    RESPONSE_FORMAT,
    Field("type", one_of("text", "json_object", "json_schema"), is_required=True),
    Field("json_schema", fields_of(JSON_SCHEMA_FIELDS)),
    # As llama.cpp, Together and others have it: the schema beside the type, without a name.
    Field("schema", any_schema),
)


@object_of(RESPONSE_FORMAT_FIELDS)
def response_format(found: Json, path: str) -> Constraint | None:
    """OpenAI's field. None: any text."""
    if found["type"] != "text" and "json_schema" not in found and "schema" in found:
        return schema_constraint(found["schema"], param="response_format")
    is_schema = found["type"] == "json_schema"
    if is_schema != ("json_schema" in found):
        needs = "is required" if is_schema else f"needs the type json_schema, not {found['type']}"
        raise InvalidRequest(f"{path}.json_schema {needs}", param=f"{path}.json_schema")
    if found["type"] == "text":
        return None
    wanted = found["json_schema"] if is_schema else {}
    schema = wanted.get("schema", ANY_OBJECT)
    return schema_constraint(schema, param="response_format", is_strict=wanted.get("strict", False))


def _form(name: str, kind: ConstraintKind, check: Check, *, is_optional: bool = False) -> Field:
    """A row whose value becomes a constraint. `is_optional`: empty text means none, because some programs always send
    all their fields."""
    schema = schema_of(check)
    if is_optional:
        schema.pop("minLength", None)

    @at_path(**schema)
    def read(value: Any, path: str) -> Constraint | None:
        if is_optional and value == "" and "string" in schema["type"]:
            return None
        found = check(value)
        is_schema = kind is ConstraintKind.JSON_SCHEMA
        return schema_constraint(found, param=path) if is_schema else Constraint(kind, found, path)

    return Field(name, read)


@at_path(type="boolean")
def _any_json(value: Any, path: str) -> Constraint | None:
    return schema_constraint(ANY_OBJECT, param=path) if boolean(value) else None


STRUCTURED_NAMES = ("json", "json_object", "regex", "choice", "grammar")
STRUCTURED_FIELDS = table(
    STRUCTURED,
    _form("json", ConstraintKind.JSON_SCHEMA, _schema_or_text),
    Field("json_object", _any_json),
    _form("regex", ConstraintKind.REGEX, some_text),
    _form("choice", ConstraintKind.CHOICE, _choices),
    _form("grammar", ConstraintKind.GRAMMAR, some_text),
)


@object_of(STRUCTURED_FIELDS)
def structured_outputs(found: Json, _: str) -> Constraint:
    """vLLM's field: an object with exactly one of STRUCTURED_NAMES."""
    forms = [form for form in found.values() if form is not None]
    if len(forms) != 1:
        raise MismatchError(f"an object with exactly one of {', '.join(STRUCTURED_NAMES)}")
    only: Constraint = forms[0]
    return only


OUTPUT_FIELDS = (
    Field("response_format", response_format),
    Field("structured_outputs", structured_outputs),
    # vLLM's older names, and llama.cpp's.
    _form("guided_json", ConstraintKind.JSON_SCHEMA, _schema_or_text, is_optional=True),
    _form("guided_regex", ConstraintKind.REGEX, some_text, is_optional=True),
    _form("guided_choice", ConstraintKind.CHOICE, _choices, is_optional=True),
    _form("guided_grammar", ConstraintKind.GRAMMAR, some_text, is_optional=True),
    _form("json_schema", ConstraintKind.JSON_SCHEMA, _schema_or_text, is_optional=True),
    _form("grammar", ConstraintKind.GRAMMAR, some_text, is_optional=True),
)


def wanted_form(values: Mapping[str, Any]) -> Constraint | None:
    """The constraint of a request's checked fields. Raises InvalidRequest if it has two."""
    found = {row.name: form for row in OUTPUT_FIELDS if (form := values.get(row.name)) is not None}
    if len(found) > 1:
        raise InvalidRequest(f"{' and '.join(found)} exclude each other: give one of them", param=list(found)[-1])
    return next(iter(found.values()), None)
