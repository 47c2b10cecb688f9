"""Rewrites JSON schemas of many dialects as draft 2020-12, with every reference resolved.

    null                          as a keyword's value, except `const`: the keyword is absent; as a schema: anything
    []                            for a schema or a map (PHP's empty map): an empty one
    5.0                           for a count: 5
    nullable: true                (OpenAPI 3.0): null is allowed as well
    items: [...], additionalItems, exclusiveMinimum: true, id, `$ref` that replaces its neighbours: drafts 4 to 7
    required: true                of a property (draft 3): its name is added to `required` of the object
    STRING, any                   types of the Gemini API and of draft 3
    format: ...                   dropped unless `runtime/grammar/schema/formats.py` has it
    $ref                          to the document itself: to `#/$defs/d1`; elsewhere: refused

Only keywords that constrain remain: descriptions, examples, `x-...` and unknown keywords are dropped.
`runtime/grammar/schema/reduction.py` decides what goes into the grammar.
"""

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from runtime.errors import InvalidRequest
from runtime.grammar.schema.formats import FORMATS
from runtime.grammar.schema.refs import ROOT, Place, References, Target, base_of

Schema = bool | dict[str, Any]
Json = TypeVar("Json", list[Any], dict[str, Any], str, bool)
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
MAX_DEPTH = 64
"""Deepest nesting of schemas. The compiler's JSON reader takes 128 levels, and a property takes two."""
MAX_SCHEMAS = 20_000
"""Most schemas, more than the compiler's source has room for. A referenced part counts once for each reference."""
UNREACHABLE_COUNT = 10_000_000
"""No answer has more characters, items or properties: a greater maximum is dropped."""
EXACT_INTEGER = 2**53
"""Floats up to this are exact for whole numbers."""
DRAFT = re.compile(r"/draft-0([3-7])/")
"""Drafts, in `$schema`, in which a `$ref` replaces its neighbours."""
SINCE_DRAFT = {"contains": 6, "propertyNames": 6, "if": 7, "then": 7, "else": 7}
"""Keywords by the draft that introduced them; earlier drafts ignore them."""
KINDS = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}
IN_PLACE = frozenset(("$ref", "allOf", "anyOf", "oneOf", "not", "if", "const"))


class PlacedSchema(dict[str, Any]):
    """A schema with its place in the request."""

    __slots__ = ("place",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place


def repair_schema(schema: Any, *, param: str) -> Schema:
    """Rewrite a schema as draft 2020-12; its objects become PlacedSchemas.

    Raises InvalidRequest, naming `param` and the place, for a malformed schema or an unresolved reference.
    """
    try:
        return _Repair(schema, param).run()
    except RecursionError:
        raise InvalidRequest(f"{param}: the JSON schema is nested too deeply", param=param) from None


class _Repair:
    """The repair of one schema."""

    def __init__(self, document: Any, param: str) -> None:
        self._document = document
        self._param = param
        self._references = References(document)
        self._names: dict[int, tuple[str, Target]] = {}  # by id(); the target kept here keeps that id in use
        self._pending: list[tuple[str, Target]] = []
        self._num_schemas = 0
        declared = document.get("$schema") if isinstance(document, dict) else None
        draft = DRAFT.search(declared) if isinstance(declared, str) else None
        self._draft = int(draft[1]) if draft is not None else None
        self._keywords = self._table()

    def run(self) -> Schema:
        root = self._schema(self._document, ROOT, "", 0)
        definitions: dict[str, Schema] = {}
        while self._pending:
            name, target = self._pending.pop()
            definitions[name] = self._schema(target.schema, target.place, target.base, 0)
        if definitions and isinstance(root, dict):
            root["$defs"] = definitions
        return root

    def _refuse(self, problem: str, place: Place) -> InvalidRequest:
        return InvalidRequest(f"{self._param}: the JSON schema {problem}, at {place.shown()}", param=self._param)

    def _table(self) -> dict[str, Callable[[Any, Place, str, int], Any]]:
        """The reader of each keyword's value. Other keywords do not constrain an answer."""
        one, several, named, lists = self._schema, self._schemas, self._schema_map, self._name_lists
        table: dict[str, Callable[[Any, Place, str, int], Any]] = {
            **dict.fromkeys(("additionalProperties", "propertyNames", "unevaluatedProperties"), one),
            **dict.fromkeys(("unevaluatedItems", "contains", "not", "if", "then", "else", "items"), one),
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), several),
            **dict.fromkeys(("properties", "patternProperties", "dependentSchemas"), named),
            "dependencies": lambda value, *rest: self._schema_map(value, *rest, may_be_names=True),
            "dependentRequired": lists,
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), self._count),
            **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), self._count),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._number),
            "multipleOf": self._positive,
            "type": self._type,
            "enum": lambda value, place, *_: [_whole(item) for item in self._of(list, value, place)],
            "const": lambda value, *_: _whole(value),
            "required": lambda value, place, *_: self._names_in(value, place),
            "uniqueItems": lambda value, place, *_: self._of(bool, value, place) or None,
            "pattern": lambda value, place, *_: self._of(str, value, place),
            "format": lambda value, place, *_: found if (found := self._of(str, value, place)) in FORMATS else None,
        }
        return table

    def _schema(self, schema: Any, place: Place, base: str, depth: int) -> Schema:
        if isinstance(schema, bool):
            return schema
        if schema is None or schema == []:
            schema = {}
        if not isinstance(schema, dict):
            raise self._refuse("must be an object", place)
        self._num_schemas += 1
        if depth > MAX_DEPTH:
            raise self._refuse(f"is nested more than {MAX_DEPTH} levels deep", place)
        if self._num_schemas > MAX_SCHEMAS:
            raise self._refuse(f"has more than {MAX_SCHEMAS:,} schemas in it", ROOT)
        base = base_of(schema, base)
        reference = self._reference(schema, place, base)
        if self._draft is not None and reference is not None:
            schema = {key: schema[key] for key in ("$ref", "nullable") if key in schema}
        found = PlacedSchema(place)
        for keyword, value in _modern(schema).items():
            if keyword in ("$ref", "$recursiveRef", "$dynamicRef"):
                if reference is not None:
                    found["$ref"] = reference
            elif self._is_read(keyword) and (value is not None or keyword == "const"):
                read = self._keywords[keyword](value, place.inside(keyword), base, depth + 1)
                if read is not None or keyword == "const":
                    found[keyword] = read
        return self._finished(found, schema)

    def _is_read(self, keyword: str) -> bool:
        is_known = self._draft is None or self._draft >= SINCE_DRAFT.get(keyword, 0)
        return is_known and keyword in self._keywords

    def _finished(self, found: PlacedSchema, schema: dict[str, Any]) -> Schema:
        """Apply what depends on several keywords: draft 3's `required` and `nullable`."""
        marked = schema.get("properties")
        required = [name for name, inner in marked.items() if _is_marked(inner)] if isinstance(marked, dict) else []
        if required:
            found["required"] = list(dict.fromkeys([*found.get("required", ()), *required]))
        if schema.get("nullable") is True or schema.get("x-nullable") is True:
            return _or_null(found)
        return found

    def _reference(self, schema: dict[str, Any], place: Place, base: str) -> str | None:
        """The new `$ref` of a schema; None if it has none, or if its target allows anything."""
        keyword = next((key for key in ("$ref", "$recursiveRef", "$dynamicRef") if schema.get(key) is not None), None)
        if keyword is None:
            return None
        place = place.inside(keyword)
        reference = self._of(str, schema[keyword], place)
        target = self._references.resolve(reference, base)
        if target is None:
            raise self._refuse(f"refers to {reference[:100]!r}, which is not in it and is not fetched", place)
        if target.schema is self._document:
            return "#"
        if target.schema is None or target.schema is True or target.schema == []:
            return None
        known = self._names.get(id(target.schema)) if isinstance(target.schema, dict) else None
        if known is None:
            # The client's names never reach the compiler.
            known = (f"d{len(self._names)}", target)
            self._names[id(target.schema) if isinstance(target.schema, dict) else id(target)] = known
            self._pending.append(known)
        name, _ = known
        return f"#/$defs/{name}"

    def _schemas(self, value: Any, place: Place, base: str, depth: int) -> list[Schema] | None:
        items = self._of(list, value, place)
        return [self._schema(item, place.inside(idx), base, depth) for idx, item in enumerate(items)] or None

    def _schema_map(
        self, value: Any, place: Place, base: str, depth: int, *, may_be_names: bool = False
    ) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name, item in self._of(dict, value, place).items():
            inner = place.inside(name)
            if may_be_names and isinstance(item, list | str):
                read[name] = self._names_in([item] if isinstance(item, str) else item, inner)
            else:
                read[name] = self._schema(item, inner, base, depth)
        return read

    def _name_lists(self, value: Any, place: Place, base: str, depth: int) -> dict[str, list[str]]:
        return {name: self._names_in(item, place.inside(name)) for name, item in self._of(dict, value, place).items()}

    def _names_in(self, value: Any, place: Place) -> list[str]:
        if isinstance(value, bool):  # draft 3's, of a property: see _finished
            return []
        names = self._of(list, value, place)
        if not all(isinstance(name, str) for name in names):
            raise self._refuse("must have a list of names", place)
        return list(dict.fromkeys(names))

    def _of(self, kind: type[Json], value: Any, place: Place) -> Json:
        """The value, which must be of this JSON type. An empty list and an empty object stand for each other."""
        if kind in (list, dict) and value in ([], {}):
            return kind()
        if not isinstance(value, kind):
            raise self._refuse(f"must have {KINDS[kind]}", place)
        return value

    def _count(self, value: Any, place: Place, *_: Any) -> int | None:
        number = self._number(value, place)
        if not isinstance(number, int) or number < 0:
            raise self._refuse("must have a whole number that is not negative", place)
        is_maximum = str(place.name).startswith("max")
        return None if is_maximum and number > UNREACHABLE_COUNT else number

    def _number(self, value: Any, place: Place, *_: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refuse("must have a number", place)
        number: int | float = _whole(value)
        return number

    def _positive(self, value: Any, place: Place, *_: Any) -> int | float:
        number = abs(self._number(value, place))
        if not number:
            raise self._refuse("must have a number that is not zero", place)
        return number

    def _type(self, value: Any, place: Place, *_: Any) -> str | list[str] | None:
        names = [self._of(str, name, place).lower() for name in (value if isinstance(value, list) else [value])]
        if "any" in names:
            return None
        for name in names:
            if name not in TYPES:
                raise self._refuse(f"has an invalid type: {name[:40]}; valid are {', '.join(TYPES)}", place)
        if not names:
            raise self._refuse("must have at least one type", place)
        return names[0] if len(names) == 1 else list(dict.fromkeys(names))


def _whole(value: Any) -> Any:
    """The same JSON value with whole numbers as integers, as the compiler requires."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_INTEGER:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


def _modern(schema: dict[str, Any]) -> dict[str, Any]:
    """Rewrite keywords whose meaning has changed since draft 4."""
    modern: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "items" and isinstance(value, list):
            modern["prefixItems"] = value
            modern["items"] = schema.get("additionalItems")
        elif keyword in ("minimum", "maximum"):
            exclusive = "exclusive" + keyword.capitalize()
            modern[exclusive if schema.get(exclusive) is True else keyword] = value
        elif keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
            continue
        else:
            modern[keyword] = value
    return modern


def _is_marked(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("required") is True


def _or_null(schema: PlacedSchema) -> PlacedSchema:
    if IN_PLACE.isdisjoint(schema):
        if "type" in schema:
            kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            schema["type"] = [*kinds, "null"] if "null" not in kinds else kinds
        if "enum" in schema and None not in schema["enum"]:
            schema["enum"] = [*schema["enum"], None]
        return schema
    null, either = PlacedSchema(schema.place), PlacedSchema(schema.place)
    null["type"] = "null"
    either["anyOf"] = [schema, null]
    return either
