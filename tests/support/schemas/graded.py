"""200 JSON schemas of rising difficulty, the same ones every time: ten levels of twenty.

    1 scalars            4 arrays              7 unions: anyOf, type lists, oneOf
    2 flat objects       5 nesting             8 $ref, recursion
    3 optional fields    6 patterns, formats   9 bounds, multipleOf, patternProperties, allOf
                                               10 all of it, at random, in depth

Strings are short and arrays few, so that an answer has an end: what is tested is the form.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

Schema = dict[str, Any]
PER_LEVEL = 20
NAMES = ("name", "city", "age", "count", "price", "active", "note", "kind", "size", "tags", "owner", "date", "score")
WORDS = ("red", "green", "blue", "north", "south", "low", "high", "open", "closed", "draft")
PATTERNS = (r"^[A-Z]{2}-[0-9]{3}$", r"^[a-z]+(_[a-z]+){0,2}$", r"^\d{4}$", r"^(yes|no|maybe)$", r"^#[0-9a-f]{6}$")
FORMATS = ("date", "uuid", "ipv4", "email", "time", "date-time")


class Graded(NamedTuple):
    """A schema, its level and its number within the level, from 0."""

    level: int
    number: int
    schema: Schema


def graded_schemas() -> list[Graded]:
    """All 200, easy ones first."""
    makers = (scalar, flat, optional, array, nested, textual, union, referring, bounded, anything)
    return [
        Graded(level, number, make(random.Random(f"{level}/{number}"), number))
        for level, make in enumerate(makers, start=1)
        for number in range(PER_LEVEL)
    ]


def scalar(rng: random.Random, number: int) -> Schema:
    low = rng.randint(-50, 50)
    kinds: list[Schema] = [
        {"type": "string", "maxLength": rng.randint(3, 20)},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 900)},
        {"type": "boolean"},
        {"enum": rng.sample(WORDS, 4)},
        {"const": rng.choice([7, "fixed", None, True, 2.5])},
        {"type": "number", "minimum": low, "maximum": low + 10},
        {"type": "null"},
    ]
    return kinds[number % len(kinds)]


def closed(properties: Schema, required: list[str] | None = None) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def flat(rng: random.Random, number: int) -> Schema:
    names = rng.sample(NAMES, 1 + number % 6)
    return closed({name: scalar(rng, rng.randrange(7)) for name in names})


def optional(rng: random.Random, number: int) -> Schema:
    names = rng.sample(NAMES, 3 + number % 4)
    return closed({name: scalar(rng, rng.randrange(7)) for name in names}, rng.sample(names, number % 3))


def array(rng: random.Random, number: int) -> Schema:
    low = rng.randint(0, 2)
    if number % 4 == 3:
        return {"type": "array", "prefixItems": [scalar(rng, i) for i in range(3)], "items": False, "minItems": 3}
    items = flat(rng, number) if number % 2 else scalar(rng, number)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}


def nested(rng: random.Random, number: int) -> Schema:
    schema: Schema = flat(rng, number)
    for _ in range(2 + number % 5):
        schema = closed({rng.choice(NAMES): schema, "level": scalar(rng, rng.randrange(4))})
    return schema


def textual(rng: random.Random, number: int) -> Schema:
    return closed(
        {
            "code": {"type": "string", "pattern": rng.choice(PATTERNS)},
            "when": {"type": "string", "format": FORMATS[number % len(FORMATS)]},
            "word": {"type": "string", "minLength": 2, "maxLength": 5 + number},
        }
    )


def union(rng: random.Random, number: int) -> Schema:
    if number % 3 == 0:
        variants = [closed({"kind": {"const": word}, word: scalar(rng, i)}) for i, word in enumerate(WORDS[:3])]
        return {"oneOf": variants}
    if number % 3 == 1:
        return closed({"value": {"type": ["string", "null", "integer"], "maxLength": 9, "minimum": 0, "maximum": 99}})
    return {"anyOf": [flat(rng, number), array(rng, 0), {"type": "null"}]}


def referring(rng: random.Random, number: int) -> Schema:
    leaf = scalar(rng, number)
    if number % 2:
        tree = {
            "type": "object",
            "properties": {
                "value": leaf,
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    chain: Schema = {f"d{i}": closed({"next": {"$ref": f"#/$defs/d{i + 1}"}}) for i in range(1 + number % 8)}
    chain[f"d{len(chain)}"] = leaf
    return {"$defs": chain, **closed({"first": {"$ref": "#/$defs/d0"}, "second": {"$ref": "#/$defs/d0"}})}


def bounded(rng: random.Random, number: int) -> Schema:
    step = rng.choice([2, 5, 7, 25])
    kinds: list[Schema] = [
        {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 40 * step},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": rng.randint(1, 9)},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 3 + step}]},
        {"type": "string", "minLength": 4, "maxLength": 4},
    ]
    schema = closed({"a": kinds[number % 4], "b": kinds[(number + 1) % 4]})
    if number % 5 == 4:
        schema["patternProperties"] = {"^x[0-9]$": {"type": "boolean"}}
    return schema


def anything(rng: random.Random, number: int) -> Schema:
    """A random tree of the other levels."""
    makers: tuple[Callable[[random.Random, int], Schema], ...] = (scalar, flat, optional, array, textual, bounded)

    def grow(depth: int) -> Schema:
        if depth == 0:
            return rng.choice(makers)(rng, rng.randrange(PER_LEVEL))
        if rng.random() < 0.25:
            return {"type": "array", "items": grow(depth - 1), "minItems": 1, "maxItems": 2}
        if rng.random() < 0.2:
            return {"anyOf": [grow(depth - 1), {"type": "null"}]}
        names = rng.sample(NAMES, rng.randint(1, 2 + number // 10))
        return closed({name: grow(depth - 1) for name in names}, [name for name in names if rng.random() < 0.7])

    return grow(1 + number // 7)
