"""Schemas, expressions and grammars meant to take all time or memory, each compiled and followed for a while.

python -m tests.grammar_bombs      prints a line for each: refused, or followed; its limits end it otherwise
"""

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar import GrammarCompiler
from tests.byte_tokenizer import byte_tokenizer

CPU_S, ADDRESS_SPACE = 60, 3 * 2**30
NUM_TOKENS = 60
EOS_ID = 257


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def branching(depth: int) -> dict[str, Any]:
    """Twice as large with each level, written out."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


def doubling(depth: int, *, combine: str) -> dict[str, Any]:
    """2 to the power of `depth`, by reference."""
    twice: dict[str, Any] = {f"d{i}": {combine: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": twice | {f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def names(count: int) -> list[str]:
    return [f"p{i * 7919 % 1_000_003}" for i in range(count)]


REGEXES = {
    "nested repetition": "((((a{9}){99}){999}){9999}){99999}",
    "behind a letter": "x((((a{9}){99}){999}){9999}){99999}",
    "repetition of ranges": "((a{1,100}){1,100}){1,100}",
    "long repetition": "[a-z]{1000000}",
    "exponential automaton": "(a|b)*a(a|b){500}",
    "distance": "(.*a.{20}){20}",
    "stars": "(a*)*" * 2000,
    "parentheses": "(" * 40_000 + "a" + ")" * 40_000,
    "alternatives": "|".join(names(12_000)),
}
GRAMMARS = {
    "ambiguous": 'start: start start | "a" | ',
    "left recursive": "start: start",
    "ambiguous layers": 'start: a a a a a a a a\na: b b b b | \nb: c c c c |\nc: "x" | "y" | ',
    "parentheses": "start: " + "(" * 40_000 + '"a"' + ")" * 40_000,
    "intersection": "start: R\nR: /(a|b)*a(a|b){30}/ & /(a|b)*b(a|b){31}/ & ~/(ab)*/",
}
SCHEMAS: dict[str, Any] = {
    "deep nesting": nested(300),
    "nesting": nested(50),
    "branching": branching(10),
    "doubling allOf": doubling(40, combine="allOf"),
    "doubling anyOf": doubling(40, combine="anyOf"),
    "reference to itself": {"$ref": "#"},
    "references in a circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "endless object": {"properties": {"x": {"$ref": "#"}}, "required": ["x"], "type": "object"},
    "circular allOf": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"minLength": 1}]}}, "$ref": "#/$defs/a"},
    "giant enum": {"enum": names(9000)},
    "optional properties": {"type": "object", "properties": {key: {"type": "string"} for key in names(1900)}},
    "union of objects": {
        "anyOf": [{"type": "object", "properties": {key: {"type": "null"} for key in names(20)}} for _ in range(150)]
    },
    "long string": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "arrays of arrays": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "multiple of a large prime": {"type": "integer", "multipleOf": 99_999_989},
    "small multiples together": {"allOf": [{"multipleOf": prime} for prime in (9973, 9967, 9949)]},
    "largest multiple": {"type": "integer", "multipleOf": 19_997, "minimum": 5},
    "pattern": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    "overlapping patterns": {"patternProperties": {f"^.*a{{{i}}}.*$": {"type": "integer"} for i in range(1, 200)}},
    "bounds": {"anyOf": [{"type": "number", "minimum": -i - 0.123456789, "maximum": i + 0.5} for i in range(900)]},
}


def bombs() -> Iterator[tuple[str, Constraint]]:
    for kind, sources in (
        (ConstraintKind.REGEX, REGEXES),
        (ConstraintKind.GRAMMAR, GRAMMARS),
        (ConstraintKind.JSON_SCHEMA, {name: json.dumps(schema) for name, schema in SCHEMAS.items()}),
    ):
        for name, source in sources.items():
            yield f"{kind}, {name}", Constraint(kind, source, "bomb")


def followed(compiler: GrammarCompiler, constraint: Constraint) -> bool:
    """Compile and go some way at random. False if it was refused, at once or later."""
    rng = np.random.default_rng(0)
    try:
        guide = compiler.guide(constraint)
        for _ in range(NUM_TOKENS):
            allowed = np.flatnonzero(guide.allowed())
            token_id = int(rng.choice(allowed))
            if token_id == EOS_ID or guide.is_stopped:
                break
            guide.advance(token_id)
            guide.num_allowed(guide.forced()[:15])
    except InvalidRequest:
        return False
    return True


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    compiler = GrammarCompiler(byte_tokenizer(), vocab_size=258, eos_ids=frozenset([EOS_ID]))
    for name, constraint in bombs():
        sys.stdout.write(f"{name}: {'followed' if followed(compiler, constraint) else 'refused'}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
