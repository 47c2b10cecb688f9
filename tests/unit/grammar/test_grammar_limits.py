"""Limits on a constraint's text: no schema in it may set the compiler's options, and costly ones need a trial."""

import json
from typing import Any

import pytest

from runtime.core import Constraint, ConstraintKind
from runtime.grammar.limits import checked, is_simple, subschemas
from runtime.grammar.notation import with_options
from runtime.text.tools.formats import HERMES, Tool, calls_grammar

OPTIONS = {"lenient": True, "whitespace_pattern": " {0,1000}"}


def schema_of(schema: Any) -> Any:
    """A JSON schema as it is compiled."""
    return json.loads(checked(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "x")).source)


def grammar_of(source: str) -> str:
    """A grammar as it is compiled."""
    return checked(Constraint(ConstraintKind.GRAMMAR, source, "x")).source


def embedded(schema: Any) -> str:
    return json.dumps(with_options(schema))


def test_options_of_a_client_are_left_out_wherever_a_schema_stands() -> None:
    part = {"type": "string", "x-guidance": OPTIONS}
    for place in ("items", "additionalProperties", "not"):
        assert schema_of({"x-guidance": OPTIONS, place: part}) == {place: {"type": "string"}}
    for place in ("properties", "$defs", "definitions", "patternProperties"):
        assert schema_of({place: {"a": part}}) == {place: {"a": {"type": "string"}}}
    for place in ("anyOf", "allOf", "prefixItems"):
        assert schema_of({place: [{"anyOf": [part]}]}) == {place: [{"anyOf": [{"type": "string"}]}]}


def test_a_property_or_a_value_may_have_the_name_of_the_options() -> None:
    for schema in (
        {"type": "object", "properties": {"x-guidance": {"type": "string"}}, "required": ["x-guidance"]},
        {"properties": {"properties": {"properties": {"x-guidance": {"const": 1}}}}},
        {"const": {"x-guidance": OPTIONS}},
        {"enum": [{"x-guidance": 1}], "default": {"x-guidance": 2}},
    ):
        assert schema_of(schema) == schema


def test_options_of_a_client_are_replaced_in_tools_and_in_grammars() -> None:
    parameters = {"type": "object", "x-guidance": OPTIONS, "properties": {"a": {"x-guidance": OPTIONS}}}
    plain = {"type": "object", "properties": {"a": {}}}
    tool = Tool(name="f", description="", parameters=parameters)
    grammar = grammar_of(calls_grammar(HERMES, [tool], is_parallel=False))
    assert grammar.endswith(f"arguments0: %json {embedded(plain)}")
    nested = f"start: %lark {{ start: %json {json.dumps(parameters)} }}"
    assert grammar_of(nested) == f"start: %lark {{ start: %json {embedded(plain)} }}"


@pytest.mark.parametrize(
    "text",
    ['"%json"', '"a\\"%json"', '"\\u0041 %json {"', r"/%json \/ {/", '%regex {"substring_chars": "%json"}'],
)
@pytest.mark.parametrize("comment", ["", "// %json\n", "# %json {\n"])
def test_only_the_keyword_is_a_schema(text: str, comment: str) -> None:
    schema = {"description": 'the words "%json" and %json {', "enum": ["%json [", "a"]}
    source = f"{comment}start: {text} %json\n\t{json.dumps(schema)} {text} %json true {text}"
    wanted = f"{comment}start: {text} %json\n\t{embedded(schema)} {text} %json {embedded({})} {text}"
    assert grammar_of(source) == wanted


def test_gbnf_has_no_schemas() -> None:
    for source in ('root ::= "%json" ["/] "x"', 'root ::= [%json]\n# "'):
        assert grammar_of(source) == source


def test_every_schema_in_a_schema_is_found_and_nothing_else() -> None:
    schema = {
        "properties": {"title": {"items": {"n": 1}}, "enum": {"n": 2}},
        "anyOf": [{"n": 3}, {"unknown": {"n": 4}}],
        "const": {"n": 5},
        "default": [{"n": 6}],
        "required": ["n"],
    }
    assert sorted(part["n"] for part in subschemas(schema) if "n" in part) == [1, 2, 3, 4]


def test_patterns_in_different_places_are_not_together() -> None:
    apart = {"properties": {f"p{i}": {"allOf": [{"pattern": "a"}, {"format": "date"}]} for i in range(20)}}
    assert schema_of(apart) == apart
    one = {"pattern": "a"}
    assert schema_of({"$defs": {"a": one}, "allOf": [{"$ref": "#/$defs/a"}] * 20}), "the same one, many times"
    circle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a", "pattern": "a"}}, "$ref": "#/$defs/a"}
    assert schema_of(circle) == circle


@pytest.mark.parametrize(
    ("kind", "source", "simple"),
    [
        (ConstraintKind.JSON_SCHEMA, {"type": "object"}, True),
        (ConstraintKind.JSON_SCHEMA, {"properties": {"pattern": {"type": "string", "format": "date"}}}, True),
        (ConstraintKind.JSON_SCHEMA, {"properties": {"a": {"pattern": "a"}}}, False),
        (ConstraintKind.JSON_SCHEMA, {"allOf": [{"type": "string"}]}, False),
        (ConstraintKind.JSON_SCHEMA, {"enum": ["a" * 5000]}, False),
        (ConstraintKind.CHOICE, ["a", "b"], True),
        (ConstraintKind.CHOICE, ["a" * 5000], False),
        (ConstraintKind.REGEX, "a", False),
        (ConstraintKind.GRAMMAR, 'start: "a"', False),
    ],
)
def test_only_what_is_always_cheap_needs_no_trial(kind: ConstraintKind, source: Any, simple: bool) -> None:
    text = source if isinstance(source, str) else json.dumps(source)
    assert is_simple(Constraint(kind, text, "x")) is simple
