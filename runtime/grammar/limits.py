"""Checks a constraint before it is compiled: its size, known bombs, and options that clients may not set.

The checks need not be complete: a constraint that passes and is not simple is compiled on trial first, in a process
that may be ended (`runtime/grammar/trial.py`). But a problem found here costs nothing and gets a helpful message.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.notation import with_options

MAX_SOURCE_CHARS = 100_000
"""Longest schema, expression or grammar. 2,000 optional properties fill it, and compile in a second."""
MAX_SIMPLE_CHARS = 4_000
"""Longest constraint that is compiled without a trial, if all its keywords are always cheap."""
MAX_MULTIPLE = 20_000
"""Bounds the states of an automaton that divides: `multipleOf: 9973` compiles in 60 ms, 100 million in an hour. Holds
for the sum and for the least common multiple of all of a schema's, counted in units of their last decimal place."""
MAX_PATTERNS = 8
"""Most patterns and formats that one string has to match at once. Each may double the time to find out whether any text
matches them all: 14 take 0.1 s, 18 take 5 s."""
MAX_FOLLOWED = 100
"""Schemas that are searched for the patterns of one string; longer chains of references are left to the trial."""

OPTIONS = "x-guidance"
"""The key of llguidance's options in a schema. With them a client could switch off the check for unimplemented
keywords, and get answers that its schema forbids."""

SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
VALUES = frozenset({"const", "enum", "default", "example", "examples", "required", "title", "description"})
SIMPLE_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const"),
        *("$schema", "$defs", "definitions", "$ref", "title", "description", "default", "examples"),
        *("minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "format"),
    }
)
"""Keywords that make no schema of MAX_SIMPLE_CHARS expensive: at most 9 ms in 1,000 random ones of them."""

LARK_WORD = re.compile(
    r'"(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})|[^"\\\x00-\x1f\x7f])*"'  # a string
    r"|/(?:\\.|[^/\\])+/"  # an expression; two slashes begin a comment
    r"|(?:#|//)[^\n]*"
    r"|%(?:json|regex|llguidance)\b"
)
JSON_SPACE = re.compile(r"[ \t\r\n]*")

Schema = dict[str, Any]


class Multiples:
    """The values of `multipleOf` in one constraint, which share the limit MAX_MULTIPLE."""

    def __init__(self) -> None:
        self._places = 0
        self._total = 0
        self._lcm = 1

    def fits(self, multiple: int | float) -> bool:
        """Whether one more is within the limit; if so, it is counted."""
        value = abs(Decimal(str(multiple)))
        places = max(self._places, -int(value.as_tuple().exponent))
        if value > MAX_MULTIPLE:
            return False
        more, scaled = 10 ** (places - self._places), int(value.scaleb(places))
        total, lcm = self._total * more + scaled, math.lcm(self._lcm * more if self._total else 1, scaled)
        if total > MAX_MULTIPLE or lcm > MAX_MULTIPLE:
            return False
        self._places, self._total, self._lcm = places, total, lcm
        return True


def refused(constraint: Constraint, problem: str) -> InvalidRequest:
    """The error for a constraint, naming its field, its kind and the problem."""
    return InvalidRequest(f"{constraint.param}: the {constraint.kind} {problem}", param=constraint.param)


def checked(constraint: Constraint) -> Constraint:
    """The constraint without a client's options for llguidance. Raises InvalidRequest for one that is too long, and for
    schemas that are known to take all time or memory."""
    num_chars = len(constraint.source)
    if num_chars > MAX_SOURCE_CHARS:
        raise refused(constraint, f"has {num_chars:,} characters; at most {MAX_SOURCE_CHARS:,} are taken")
    multiples = Multiples()

    def check(schema: Any) -> Any:
        for part in subschemas(schema):
            part.pop(OPTIONS, None)
            multiple = part.get("multipleOf")
            if isinstance(multiple, int | float) and math.isfinite(multiple) and not multiples.fits(multiple):
                raise refused(constraint, f"has a multipleOf that is too large; the limit is {MAX_MULTIPLE:,} steps")
            if ("allOf" in part or "$ref" in part) and _num_patterns(part, schema) > MAX_PATTERNS:
                raise refused(constraint, f"has more than {MAX_PATTERNS} patterns and formats for the same string")
        return schema

    source = constraint.source
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        source = json.dumps(check(_parsed(constraint)), separators=(",", ":"))
    elif constraint.kind is ConstraintKind.GRAMMAR and not is_gbnf(source):
        source = _with_schemas(constraint, check)
    return replace(constraint, source=source)


def is_simple(constraint: Constraint) -> bool:
    """Whether a checked constraint compiles in milliseconds and kilobytes, as its text shows."""
    if len(constraint.source) > MAX_SIMPLE_CHARS:
        return False
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        return all(SIMPLE_KEYWORDS.issuperset(part) for part in subschemas(json.loads(constraint.source)))
    return constraint.kind is ConstraintKind.CHOICE


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is in llama.cpp's notation, which has no schemas in it, rather than in Lark's."""
    from llguidance.gbnf_to_lark import is_lark_syntax

    return "::=" in grammar and not is_lark_syntax(grammar)


def subschemas(schema: Any) -> Iterator[Schema]:
    """Every object that is a schema, the outermost first. Values and names are left out: a property may have the name
    of a keyword."""
    pending = [schema]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            yield item
            for keyword, value in item.items():
                if keyword in SCHEMAS_BY_NAME and isinstance(value, dict):
                    pending.extend(value.values())
                elif keyword not in VALUES:
                    pending.append(value)


def _parsed(constraint: Constraint) -> Any:
    try:
        return json.loads(constraint.source)
    except (ValueError, RecursionError) as error:
        raise refused(constraint, f"cannot be read: {error}") from None


def _with_schemas(constraint: Constraint, check: Callable[[Any], Any]) -> str:
    """A Lark grammar with every schema behind a `%json` checked. Raises InvalidRequest where no JSON follows."""
    source, pieces, copied, place = constraint.source, [], 0, 0
    decoder = json.JSONDecoder()
    while (word := LARK_WORD.search(source, place)) is not None:
        place = word.end()
        if not word[0].startswith("%"):
            continue
        start = _end_of_space(source, place)
        try:
            value, place = decoder.raw_decode(source, start)
        except (ValueError, RecursionError):
            problem = f"cannot be read: no JSON follows {word[0]} at character {word.start()}"
            raise refused(constraint, problem) from None
        if word[0] == "%json":
            pieces += [source[copied:start], json.dumps(with_options(check(value)))]
            copied = place
    return "".join([*pieces, source[copied:]])


def _end_of_space(text: str, place: int) -> int:
    space = JSON_SPACE.match(text, place)
    assert space is not None
    return space.end()


def _num_patterns(schema: Schema, root: Any) -> int:
    """Number of patterns and formats that apply to the same string: a schema's own and those of its `$ref` and `allOf`,
    in at most MAX_FOLLOWED schemas."""
    pending: list[Any] = [schema]
    seen: set[int] = set()
    count = 0
    while pending and len(seen) < MAX_FOLLOWED:
        part = pending.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        count += ("pattern" in part) + ("format" in part)
        together = part.get("allOf")
        pending += together if isinstance(together, list) else []
        pending.append(_target(root, part.get("$ref")))
    return count


def _target(root: Any, ref: Any) -> Any:
    """The target of a reference within the document, None for other references."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    found = root
    for step in ref[1:].split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found
