r"""Schemas of the kinds that generators write, with answers that are right and wrong.

Written for these tests after the manner of each generator. `left_out`: the keywords that no grammar holds.
"""

from typing import Any, NamedTuple

Json = dict[str, Any]


class Wild(NamedTuple):
    """A schema, answers that follow it and answers that do not."""

    name: str
    schema: Any
    good: list[Any]
    bad: list[Any]
    left_out: tuple[str, ...] = ()


def closed(**properties: Any) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def value(schema: Any) -> Json:
    """An object with one property."""
    return closed(v=schema)


def values(*items: Any) -> list[Json]:
    return [{"v": item} for item in items]


DRAFT_4, DRAFT_7 = (f"http://json-schema.org/draft-0{number}/schema#" for number in (4, 7))
ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
PYDANTIC_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "tricks": {"type": "array"}}, "required": ["kind"]}

WILD = [
    # zod
    Wild(
        "zod: record of strings",
        value({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "string"}}),
        values({}, {"a": "b"}),
        values({"a": 1}, []),
    ),
    Wild(
        "zod: record of an enum's names",
        value(
            {
                "type": "object",
                "propertyNames": {"type": "string", "enum": ["north", "south"]},
                "additionalProperties": {"type": "integer"},
                "required": ["north"],
            }
        ),
        values({"north": 1}, {"north": 1, "south": 2}),
        values({}, {"north": 1, "east": 2}, {"north": "x"}),
    ),
    Wild(
        "zod: email",
        value({"type": "string", "format": "email", "pattern": ZOD_EMAIL}),
        values("a.b@example.org"),
        values("a", "a..b@example.org", ".a@example.org"),
        ("/properties/v/pattern",),
    ),
    Wild(
        "zod: tuple, set and never",
        {
            "$schema": DRAFT_7,
            "type": "object",
            "properties": {
                "pair": {
                    "type": "array",
                    "minItems": 2,
                    "maxItems": 2,
                    "items": [{"type": "string"}, {"type": "null"}],
                },
                "set": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
                "never": {"not": {}},
            },
            "required": ["pair"],
            "additionalProperties": False,
        },
        [{"pair": ["a", None]}, {"pair": ["a", None], "set": [1, 2]}],
        [
            {"pair": ["a"]},
            {"pair": [None, "a"]},
            {"pair": ["a", None], "set": [1, 1]},
            {"pair": ["a", None], "never": 1},
        ],
        ("/properties/set/uniqueItems",),
    ),
    Wild(
        "zod: intersection",
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
            ],
            "unevaluatedProperties": False,
        },
        [{"a": "x", "b": 1}],
        [{"a": "x"}, {"a": "x", "b": 1, "c": 2}],
        ("/unevaluatedProperties",),
    ),
    Wild(
        "zod: recursion by a pointer into the schema",
        closed(
            name={"type": "string"},
            children={"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        ),
        [{"name": "a", "children": [{"name": "b", "children": []}]}],
        [{"name": "a", "children": [{"name": "b"}]}],
    ),
    Wild(
        "zod: dates and numbers",
        closed(
            when={"type": "string", "format": "date-time"},
            big={"type": "integer", "format": "int64"},
            safe={"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
        ),
        [{"when": "2026-01-02T03:04:05Z", "big": 1, "safe": -9007199254740991}],
        [
            {"when": "yesterday", "big": 1, "safe": 0},
            {"when": "2026-01-02T03:04:05Z", "big": 1, "safe": 9007199254740992},
        ],
    ),
    # pydantic
    Wild(
        "pydantic: optional, const, reference with a description",
        {
            "$defs": {"Size": {"enum": ["s", "m"], "title": "Size", "type": "string"}},
            "properties": {
                "size": {"$ref": "#/$defs/Size", "description": "how large", "default": "s"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Note"},
            },
            "required": ["size"],
            "title": "Order",
            "type": "object",
        },
        [{"size": "m"}, {"size": "s", "note": None}],
        [{"size": "x"}, {"note": "a"}, {"size": "s", "note": 1}],
    ),
    Wild(
        "pydantic: discriminated union",
        {
            "$defs": {"Cat": CAT, "Dog": DOG},
            "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        },
        [{"kind": "cat", "lives": 9}, {"kind": "dog"}],
        [{"kind": "cow"}, {"lives": 9}, {"kind": "cat", "lives": "many"}],
    ),
    Wild(
        "pydantic: decimal",
        value({"anyOf": [{"type": "number"}, {"type": "string", "pattern": PYDANTIC_DECIMAL}]}),
        values(1.5, "1.5", "-2"),
        values("x", "-", True),
        ("/properties/v/anyOf/1/pattern",),
    ),
    Wild(
        "pydantic: formats that are annotations",
        closed(
            path={"type": "string", "format": "path"},
            secret={"type": "string", "format": "password", "writeOnly": True},
            address={"type": "string", "format": "ipvanyaddress"},
            data={"type": "string", "format": "binary"},
        ),
        [{"path": "/a", "secret": "b", "address": "c", "data": ""}],
        [{"path": 1, "secret": "b", "address": "c", "data": ""}],
    ),
    # schemars, serde, Go, Java, .NET
    Wild(
        "schemars: unsigned with float bounds, enum with descriptions",
        {
            "$schema": DRAFT_7,
            "definitions": {
                "Level": {
                    "oneOf": [
                        {"description": "quiet", "type": "string", "enum": ["Low"]},
                        {"description": "loud", "type": "string", "enum": ["High"]},
                    ]
                }
            },
            "properties": {
                "depth": {"type": "integer", "format": "uint8", "minimum": 0.0, "maximum": 255.0},
                "level": {"allOf": [{"$ref": "#/definitions/Level"}]},
            },
            "required": ["depth", "level"],
            "type": "object",
            "additionalProperties": False,
        },
        [{"depth": 255, "level": "Low"}],
        [{"depth": 256, "level": "Low"}, {"depth": -1, "level": "Low"}, {"depth": 1, "level": "low"}],
    ),
    Wild(
        "invopop: root reference, map by a pattern",
        {
            "$id": "https://example.org/config",
            "$ref": "#/$defs/Config",
            "$defs": {
                "Config": {
                    "properties": {
                        "labels": {"patternProperties": {".*": {"type": "string"}}, "type": "object"},
                        "raw": {"type": "string", "contentEncoding": "base64"},
                        "any": True,
                    },
                    "additionalProperties": False,
                    "type": "object",
                    "required": ["labels"],
                }
            },
        },
        [{"labels": {"a": "b"}}, {"labels": {}, "raw": "aa", "any": [1]}],
        [{"labels": {"a": 1}}, {"labels": {}, "other": 1}],
    ),
    Wild(
        "go: nil maps and slices",
        {"type": "object", "properties": None, "required": None, "additionalProperties": None, "enum": None},
        [{}, {"a": 1}],
        [1, []],
    ),
    Wild(
        "victools: names with brackets, bounds of 64 bits",
        {
            "$defs": {
                "Map(String,Long)": {"type": "object", "additionalProperties": {"$ref": "#/$defs/Long"}},
                "Long": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            },
            "$ref": "#/$defs/Map(String%2CLong)",
        },
        [{"a": 9223372036854775807}, {}],
        [{"a": "b"}, {"a": 9223372036854775808}],
    ),
    Wild(
        "jackson: draft 3's required, ids that are URNs",
        {
            "type": "object",
            "id": "urn:jsonschema:org:example:Node",
            "properties": {
                "name": {"type": "string", "required": True},
                "next": {"type": "object", "$ref": "urn:jsonschema:org:example:Node"},
            },
        },
        [{"name": "a"}, {"name": "a", "next": {"name": "b"}}],
        [{}, {"name": "a", "next": {}}],
    ),
    Wild(
        ".net: numbers as text, nullable reference",
        closed(
            count={"type": ["string", "integer"], "pattern": r"^-?(?:0|[1-9]\d*)$"},
            id={"type": "string", "format": "guid"},
            next={"oneOf": [{"type": "null"}, {"$ref": "#/properties/count"}]},
        ),
        [{"count": 1, "id": "x", "next": None}, {"count": "12", "id": "x", "next": "3"}],
        [{"count": "01", "id": "x", "next": None}, {"count": 1, "id": "x", "next": False}],
    ),
    # typebox
    Wild(
        "typebox: recursive, by the schema's own id",
        {
            "$id": "T0",
            "type": "object",
            "required": ["nodes"],
            "properties": {"nodes": {"type": "array", "items": {"$ref": "T0"}}},
        },
        [{"nodes": []}, {"nodes": [{"nodes": []}]}],
        [{"nodes": [{}]}],
    ),
    Wild(
        "typebox: record, never, literals",
        closed(
            record={"type": "object", "patternProperties": {"^(.*)$": {"type": "boolean"}}},
            kind={"anyOf": [{"const": "a", "type": "string"}, {"const": "b", "type": "string"}]},
        )
        | {"unevaluatedProperties": {}},
        [{"record": {"x": True}, "kind": "b"}],
        [{"record": {"x": 1}, "kind": "b"}, {"record": {}, "kind": "c"}],
    ),
    # OpenAPI
    Wild(
        "openapi: nullable",
        closed(
            name={"type": "string", "nullable": True, "example": "x"},
            kind={"type": "string", "enum": ["a"], "nullable": True},
            other={"allOf": [{"$ref": "#/properties/kind"}], "nullable": True},
            plain={"type": "integer", "nullable": False, "format": "int32"},
        ),
        [{"name": None, "kind": None, "other": None, "plain": 1}, {"name": "x", "kind": "a", "other": "a", "plain": 1}],
        [
            {"name": 1, "kind": "a", "other": "a", "plain": 1},
            {"name": "x", "kind": "b", "other": "a", "plain": 1},
            {"name": "x", "kind": "a", "other": "a", "plain": None},
        ],
    ),
    Wild(
        "openapi: exclusive bounds of draft 4",
        {
            "$schema": DRAFT_4,
            "type": "array",
            "items": {
                "type": "integer",
                "minimum": 0,
                "exclusiveMinimum": True,
                "maximum": 3,
                "exclusiveMaximum": False,
            },
            "maxItems": 2.0,
        },
        [[1, 3], []],
        [[0], [4], [1, 1, 1]],
    ),
    Wild(
        "gemini: types in capitals",
        {"type": "OBJECT", "properties": {"a": {"type": "STRING", "format": "enum", "enum": ["x"]}}, "required": ["a"]},
        [{"a": "x"}],
        [{"a": "y"}, {}],
    ),
    Wild(
        "php: empty maps written as lists",
        {"type": "object", "properties": [], "required": {}, "patternProperties": [], "$defs": []},
        [{}, {"a": 1}],
        [[]],
    ),
    Wild(
        "draft 7: what stands beside a reference says nothing",
        {
            "$schema": DRAFT_7,
            "definitions": {"name": {"type": "string"}},
            "properties": {"v": {"$ref": "#/definitions/name", "maxLength": 1}},
            "required": ["v"],
            "type": "object",
            "additionalProperties": False,
        },
        values("long enough"),
        values(1),
    ),
    Wild(
        "draft 2020: what stands beside a reference holds",
        {"$defs": {"name": {"type": "string"}}, **value({"$ref": "#/$defs/name", "maxLength": 1})},
        values("a"),
        values("ab", 1),
    ),
    Wild(
        "draft 4: anchors and ids",
        {
            "$schema": DRAFT_4,
            "id": "http://example.org/root.json",
            "definitions": {"a": {"id": "#letter", "enum": ["a"]}, "b": {"id": "item.json", "enum": ["b"]}},
            "type": "array",
            "items": {"anyOf": [{"$ref": "#letter"}, {"$ref": "http://example.org/item.json"}]},
        },
        [["a", "b"]],
        [["c"]],
    ),
    Wild(
        "definitions inside of a property, names to be escaped",
        {
            "type": "object",
            "properties": {
                "o": {"$ref": "#/properties/o/$defs/T~1x y", "$defs": {"T/x y": {"type": "string", "maxLength": 2}}},
                "p": {"$ref": "#/properties/o/$defs/T~1x%20y"},
            },
            "required": ["o"],
            "additionalProperties": False,
        },
        [{"o": "ab", "p": "a"}],
        [{"o": "abc"}, {"o": "a", "p": 1}],
    ),
    Wild(
        "formats: the grammar's, by a pattern, only checked, unknown",
        closed(
            email={"type": "string", "format": "email"},
            link={"type": ["string", "null"], "format": "uri-reference", "pattern": "^a"},
            code={"type": "string", "format": "regex"},
            other={"type": ["string", "integer"], "format": "uint"},
        ),
        [{"email": "a@b.c", "link": "a/b", "code": "a+", "other": -1}],
        [
            {"email": "a", "link": "a", "code": "a", "other": 1},
            {"email": "a@b.c", "link": "a b", "code": "a", "other": 1},
            {"email": "a@b.c", "link": "/b", "code": "a", "other": 1},
            {"email": "a@b.c", "link": "a", "code": "(a", "other": 1},
        ],
    ),
    Wild(
        "draft 4: a keyword of a later one says nothing",
        {"$schema": DRAFT_4, "type": "integer", "if": {"minimum": 5}, "then": False},
        [1, 9],
        ["a"],
    ),
    # What no grammar holds
    Wild(
        "if, then, else",
        {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer"}},
            "required": ["kind"],
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"required": ["size"]},
            "else": {"not": {"required": ["size"]}},
        },
        [{"kind": "a", "size": 1}, {"kind": "b"}],
        [{"kind": "a"}, {"kind": "b", "size": 1}, {"kind": "c"}],
        ("/if",),
    ),
    Wild(
        "not",
        value({"type": "string", "not": {"enum": ["admin", "root"]}}),
        values("me"),
        values("root", 1),
        ("/properties/v/not",),
    ),
    Wild(
        "contains",
        value({"type": "array", "items": {"type": "integer"}, "contains": {"minimum": 10}, "maxContains": 1}),
        values([1, 10]),
        values([1], [10, 11], ["a"]),
        ("/properties/v/contains",),
    ),
    Wild(
        "dependencies of all drafts",
        {
            "type": "object",
            "properties": {name: {"type": "integer"} for name in "abcdef"},
            "dependencies": {"a": ["b"], "c": {"required": ["d"]}},
            "dependentRequired": {"e": ["f"]},
            "dependentSchemas": {"f": {"properties": {"a": False}}},
        },
        [{}, {"a": 1, "b": 1}, {"c": 1, "d": 1}, {"e": 1, "f": 1}],
        [{"a": 1}, {"c": 1}, {"e": 1}, {"a": 1, "b": 1, "f": 1}],
        ("/dependencies", "/dependentRequired", "/dependentSchemas"),
    ),
    Wild(
        "one of two that overlap",
        {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
        ("/oneOf",),
    ),
    Wild(
        "one of some that exclude each other",
        {
            "oneOf": [
                {"type": "integer", "maximum": 3},
                {"type": "number", "exclusiveMinimum": 3},
                {"enum": ["a", None]},
                {"const": "b"},
                {"type": "object", "properties": {"x": {}}, "required": ["x"], "additionalProperties": False},
                {"type": "object", "properties": {"y": {}}, "required": ["y"], "additionalProperties": False},
            ]
        },
        [3, 4.5, "a", None, "b", {"x": 1}, {"y": 1}],
        [2.5, "c", {"x": 1, "y": 1}],
    ),
    Wild(
        "numbers of properties",
        {
            "type": "object",
            "properties": {
                "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
                "one": closed(a={}, b={}) | {"required": [], "minProperties": 1},
                "two": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2},
            },
        },
        [{"map": {"x": 1, "y": 2}, "one": {"b": 1}, "two": {"a": 1, "z": 1}}],
        [{"map": {"x": 1, "y": 2, "z": 3}}, {"one": {}}, {"two": {"a": 1}}],
        ("/properties/two/minProperties",),
    ),
    Wild(
        "names by a pattern, by length, and by what no grammar holds",
        closed(
            p={"type": "object", "propertyNames": {"pattern": "^x-"}, "additionalProperties": {"type": "integer"}},
            q={"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}},
            r={"type": "object", "propertyNames": {"format": "date"}},
        ),
        [{"p": {"x-a": 1}, "q": {"ab": 1}, "r": {"2026-01-01": 1}}],
        [{"p": {"a": 1}, "q": {}, "r": {}}, {"p": {}, "q": {"a": 1}, "r": {}}, {"p": {}, "q": {}, "r": {"a": 1}}],
        ("/properties/r/propertyNames",),
    ),
    Wild(
        "patterns for names that overlap, and that do not",
        closed(
            apart={
                "type": "object",
                "patternProperties": {"^a": {"type": "integer"}, "^(b|c)": {"type": "string"}},
                "additionalProperties": False,
            },
            overlapping={
                "type": "object",
                "patternProperties": {"a": {"type": "integer"}, "b": {"minimum": 5}},
                "additionalProperties": {"type": "string"},
            },
        ),
        [{"apart": {"a": 1, "c": "x"}, "overlapping": {"ab": 6, "z": "x"}}],
        [
            {"apart": {"a": "x"}, "overlapping": {}},
            {"apart": {"d": 1}, "overlapping": {}},
            {"apart": {}, "overlapping": {"ab": 4}},
            {"apart": {}, "overlapping": {"z": 1}},
        ],
        ("/properties/overlapping/patternProperties",),
    ),
    Wild(
        "a name declared that a pattern matches, too",
        closed(score={"type": "integer", "multipleOf": 5}) | {"patternProperties": {"^score$": {"maximum": 10}}},
        [{"score": 10}],
        [{"score": 15}, {"score": 3}],
    ),
    Wild(
        "constants that have no exact text in a grammar",
        {"type": "array", "items": {"enum": [1e-7, 9007199254740993, "a"]}},
        [[1e-7, "a"], [9007199254740993]],
        [[9007199254740992], ["b"], [0.5]],
        ("/items/enum",),
    ),
    Wild(
        "multiples that take too many steps together",
        {
            "type": "array",
            "items": False,
            "prefixItems": [{"type": "integer", "multipleOf": step} for step in (86_400_000, 5, 9973, 9967)],
        },
        [[86_400_000, 5, 9973, 9967], []],
        [[1], [86_400_000, 6], [86_400_000, 5, 1], [86_400_000, 5, 9973, 1]],
        ("/prefixItems/0/multipleOf", "/prefixItems/2/multipleOf", "/prefixItems/3/multipleOf"),
    ),
    Wild(
        "multiples of people",
        closed(price={"type": "number", "multipleOf": 0.01}, score={"type": "integer", "multipleOf": 5.0}),
        [{"price": 1.25, "score": 10}],
        [{"price": 1.255, "score": 10}, {"price": 1, "score": 3}],
    ),
    Wild(
        "a property named like a keyword, and unknown keywords",
        {
            "type": "object",
            "properties": {"x-guidance": {"type": "string"}, "$ref": {"type": "string"}, "required": {"type": "null"}},
            "required": ["x-guidance"],
            "additionalProperties": False,
            "x-guidance": {"lenient": True, "whitespace_pattern": ".*"},
            "x-order": 1,
            "deprecated": True,
        },
        [{"x-guidance": "a", "$ref": "b", "required": None}],
        [{}, {"x-guidance": 1}],
    ),
]
