"""Schemas, expressions and grammars meant to take all time, memory or stack, each compiled and followed for a while.

python -m tests.support.schemas.bombs      prints a line for each: refused, or followed; its limits end it otherwise

benchmarks/grammar_fire.py sends them to a real server.
"""

import json
import resource
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.grammar import GrammarCompiler
from runtime.grammar.helper import Limits
from runtime.grammar.trial import Lane
from tests.support.byte_tokenizer import byte_tokenizer

CPU_S, ADDRESS_SPACE = 60, 3 * 2**30
NUM_TOKENS = 60
SHORT_LANES = (Lane(2, Limits(cpu_s=0.06, wall_s=5.0)), Lane(2, Limits(cpu_s=0.25, wall_s=20.0)))
"""An eighth of the server's patience: what takes all of it takes all of this."""
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


def chain(depth: int) -> dict[str, Any]:
    """References through arrays, each followed by recursion: 700 levels took the 8 MB of an ordinary stack."""
    levels: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}}]}
        for i in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": levels | {f"d{depth}": {"type": "null"}}}


def aliases(depth: int) -> dict[str, Any]:
    """References to references."""
    levels: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": levels | {f"d{depth}": {"type": "null"}}}


def patterns(count: int) -> list[str]:
    """Expressions whose intersection takes about 2.6 times the time with each of them."""
    return [f".*{chr(97 + i % 26)}.{{{i}}}" for i in range(count)]


def same_property(count: int) -> dict[str, Any]:
    """As many patterns for one string, none of them beside another."""
    parts = [{"properties": {"a": {"type": "string", "pattern": pattern}}} for pattern in patterns(count)]
    return {"type": "object", "allOf": parts, "required": ["a"]}


def rules(count: int, rule: str, last: str, before: str = "start: r0") -> str:
    """A grammar of rules that each refer to the next: `{i}` is a rule's number, `{j}` the next one's."""
    lines = [rule.replace("{i}", str(i)).replace("{j}", str(i + 1)) for i in range(count)]
    return "\n".join([before, *lines, last.replace("{i}", str(count))])


def names(count: int) -> list[str]:
    return [f"p{i * 7919 % 1_000_003}" for i in range(count)]


LARGE_MULTIPLE = '{"type": "integer", "multipleOf": 99999989}'
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
    "alternatives in a star": "(" + "|".join(f".*{name}" for name in names(3000)) + ")*",
    "nested counts": "(a{1000}){1000}",
    "deeper nested counts": "(((a{1000}){1000}){1000}b){1000}",
    "repeated text": "(abc ){1000000}",
    "unicode classes": r"(\p{L}{1,100}\p{N}?){1,100}",
    "everything": r".{0,100000}",
    "everything but letters": r"[^\p{L}]{0,100000}",
    "long text": "xy z" * 22_000,
    "optional letters": "a?" * 20_000 + "a" * 20_000,
}
GRAMMARS = {
    "ambiguous": 'start: start start | "a" | ',
    "left recursive": "start: start",
    "ambiguous layers": 'start: a a a a a a a a\na: b b b b | \nb: c c c c |\nc: "x" | "y" | ',
    "parentheses": "start: " + "(" * 40_000 + '"a"' + ")" * 40_000,
    "rules": rules(4400, 'r{i}: "a" r{j} | "b"', 'r{i}: "c"'),
    "rules for rules": rules(6800, "r{i}: r{j}", 'r{i}: "c"'),
    "terminals": rules(3900, 'T{i}: "a" T{j} "b"|"c"', 'T{i}: "c"', "start: T0"),
    "counted terminals": rules(3900, 'T{i}: (T{j}"b"){0,3}', 'T{i}: "c"', "start: T0"),
    "refused terminals": rules(1500, 'T{i}: ~(T{j}"b")', 'T{i}: "c"', 'start: "x"{60} T0'),
    "intersection in a star": "start: R\nR: (" + " & ".join(f"/{pattern}/" for pattern in patterns(16)) + ")*",
    "hidden intersection": "start: X{60} R\nX: /x/\nR: (" + " & ".join(f"/{p}/" for p in patterns(9)) + ")*",
    "hidden count": 'start: X{60} R\nX: "xxxxxxxx"\nR: /((((a{9}){99}){999}){9999}){99999}/',
    "repeated rule": 'start: a{1000}\na: b{1000}\nb: "abc "{1000}',
    "schema": f"start: %json {LARGE_MULTIPLE}",
    "schema behind text": f'start: "%json" %json {LARGE_MULTIPLE}',
    "schema with the word": 'start: %json {"title": "%json", "type": "integer", "multipleOf": 99999989}',
    "schema in a grammar": f"start: %lark {{ start: %json {LARGE_MULTIPLE} }}",
    "substrings": 'start: %regex {"substring_chars": ' + json.dumps("abcab" * 15_000) + "}",
    "GBNF rules": rules(3300, 'r{i} ::= "a" r{j} | "b"', 'r{i} ::= "c"', "root ::= r0"),
    "GBNF parentheses": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "GBNF alternatives": "root ::= " + " | ".join(f'"{name}"' for name in names(8000)),
    "intersection": "start: R\nR: /(a|b)*a(a|b){30}/ & /(a|b)*b(a|b){31}/ & ~/(ab)*/",
}
SCHEMAS: dict[str, Any] = {
    "deep nesting": nested(300),
    "nesting": nested(50),
    "references": chain(1000),
    "references only": aliases(2500),
    "allOf of references": doubling(400, combine="allOf"),
    "patterns": {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns(30)]},
    "patterns of a property": same_property(30),
    "deeply nested arrays": json.loads('{"items":' * 120 + "{}" + "}" * 120),
    "options": {"x-guidance": {"lenient": True}, "type": "integer", "multipleOf": 99_999_989},
    "large constant": {"const": "xy z" * 22_000},
    "large constants": {"enum": ["xy z" * 5000 + str(i) for i in range(4)]},
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
        (ConstraintKind.CHOICE, {"large": json.dumps(["xy z" * 22_000]), "many": json.dumps(names(5000))}),
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
    threading.stack_size(2**20)  # grammars are followed on threads that may have little more
    compiler = GrammarCompiler(byte_tokenizer(), vocab_size=258, eos_ids=frozenset([EOS_ID]), lanes=SHORT_LANES)
    all_bombs = list(bombs())
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda bomb: followed(compiler, bomb[1]), all_bombs)
        for (name, _), is_followed in zip(all_bombs, results, strict=True):
            sys.stdout.write(f"{name}: {'followed' if is_followed else 'refused'}\n")
            sys.stdout.flush()
    compiler.close()


if __name__ == "__main__":
    main()
