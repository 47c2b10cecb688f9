"""JSON schemas of the wild: what compiles, what is left to the check, what is refused and how."""

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.grammar import GrammarCompiler
from runtime.grammar.schema.check import Outcome, check_answer
from runtime.grammar.schema.translation import TranslatedSchema, translate_schema
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.schemas.graded import graded_schemas
from tests.support.schemas.wild import WILD, Wild, closed, value

EOS_ID = 257
TOKENIZER = byte_tokenizer()
PARAM = "response_format"


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab_size=258, eos_ids=frozenset([EOS_ID]))


def translated(schema: Any, *, is_strict: bool = False) -> TranslatedSchema:
    return translate_schema(schema, param=PARAM, is_strict=is_strict)


def lets_through(compiler: GrammarCompiler, found: TranslatedSchema, answer: Any) -> bool:
    """Whether the grammar takes the whole answer."""
    guide = compiler.guide(Constraint(ConstraintKind.JSON_SCHEMA, found.source, PARAM))
    for token_id in TOKENIZER.encode(json.dumps(answer), add_special_tokens=False):
        if not guide.allowed()[token_id]:
            return False
        guide.advance(token_id)
    return guide.is_stopped or bool(guide.allowed()[EOS_ID])


def outcomes(found: TranslatedSchema, answer: Any) -> list[Outcome]:
    return [check_answer(check, json.dumps(answer)).outcome for check in found.late_checks]


@pytest.mark.parametrize("wild", WILD, ids=lambda wild: wild.name)
def test_right_answers_can_be_written_and_wrong_ones_are_found(compiler: GrammarCompiler, wild: Wild) -> None:
    found = translated(wild.schema)
    assert tuple(place for check in found.late_checks for place in check.left_out) == wild.left_out
    for answer in wild.good:
        assert lets_through(compiler, found, answer), answer
        assert set(outcomes(found, answer)) <= {Outcome.PASSED}, answer
    for answer in wild.bad:
        assert not lets_through(compiler, found, answer) or Outcome.FAILED in outcomes(found, answer), answer


@pytest.mark.parametrize("wild", WILD, ids=lambda wild: wild.name)
def test_strict_takes_all_of_a_schema_or_says_what_it_cannot(compiler: GrammarCompiler, wild: Wild) -> None:
    if not wild.left_out:
        assert translated(wild.schema, is_strict=True).source == translated(wild.schema).source
        return
    with pytest.raises(InvalidRequest) as refused:
        found = translated(wild.schema, is_strict=True)
        compiler.guide(Constraint(ConstraintKind.JSON_SCHEMA, found.source, PARAM))
    place, _, keyword = wild.left_out[0].rpartition("/")
    told = [f"`{keyword}` at {place or 'the top'}", "patternProperty regexes"]  # the compiler's words for overlaps
    assert any(words in str(refused.value) for words in told) and refused.value.param == PARAM


def test_what_always_compiled_is_not_left_to_a_check() -> None:
    for graded in graded_schemas():
        assert not translated(graded.schema, is_strict=True).late_checks


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "invalid type: strin; valid are null, boolean"),
        ({"properties": {"a": {"type": "strin"}}}, "at /properties/a/type"),
        ({"items": {"minLength": "3"}}, "must have a number, at /items/minLength"),
        ({"maxLength": -1}, "not negative, at /maxLength"),
        ({"maxItems": 1.5}, "whole number"),
        ({"multipleOf": 0}, "not zero"),
        ({"enum": "a"}, "a list, at /enum"),
        ({"required": ["a", 1]}, "list of names"),
        ({"properties": {"a": "string"}}, "must be an object, at /properties/a"),
        ({"properties": ["a"]}, "an object, at /properties"),
        ({"anyOf": {"type": "null"}}, "a list, at /anyOf"),
        ({"additionalProperties": "false"}, "at /additionalProperties"),
        ({"uniqueItems": "yes"}, "true or false"),
        ({"pattern": "(a"}, "opens a group at 0 that it does not close, at /pattern"),
        ({"patternProperties": {"[a": {}}}, "opens a class at 0"),
        ({"$ref": "#/$defs/a"}, "'#/$defs/a', which is not in it"),
        ({"$ref": "http://127.0.0.1:9/a.json#/b"}, "is not fetched, at /$ref"),
        ({"$ref": "http://[x"}, "is not in it"),
        ({"$ref": 1}, "a string, at /$ref"),
        ({"properties": {"a\nb": {"type": 1}}}, "at /properties/a\\nb/type"),
        ({"minimum": float("nan")}, "a number"),
    ],
)
@pytest.mark.parametrize("is_strict", [False, True])
def test_a_mistake_is_told_with_its_place(schema: Any, words: str, is_strict: bool) -> None:
    with pytest.raises(InvalidRequest) as refused:
        translated(schema, is_strict=is_strict)
    message = str(refused.value)
    assert words in message and "\n" not in message and message.startswith(f"{PARAM}: ")


def test_only_what_constrains_reaches_the_compiler() -> None:
    """Length limits hold for that: a description may be as long as the request."""
    told = {"description": "x" * 200_000, "title": "T", "examples": [1], "$comment": "c", "default": "d", "x-y": {}}
    schema = {**value({"type": "string", **told}), **told, "$defs": {"unused": {"type": "string"}}}
    assert translated(schema).source == translated(value({"type": "string"})).source


def test_counts_beyond_any_answer_are_not_compiled() -> None:
    beyond = {"minItems": 10**9, "maxItems": 10**9, "maxLength": 2**63, "minProperties": 10**9}
    found = translated({**beyond, "minLength": 5, "maxProperties": 2**31 - 1, "minimum": -(2**63)})
    assert found.source == '{"minLength":5}'
    (check,) = found.late_checks
    assert check.left_out == ("/minProperties",) and check_answer(check, "[]").outcome is Outcome.FAILED


def test_a_schema_that_is_not_an_object() -> None:
    assert translated(True).source == "true"
    assert translated(None).source == translated([]).source == "{}"
    assert translated(False).source == translated({"not": {}}).source == "false"


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("depth", [65, 300, 900, 5000])
def test_a_schema_within_schemas_without_end(depth: int) -> None:
    assert translated(nested(60)).source.count("items") == 60
    with pytest.raises(InvalidRequest, match="nested"):
        translated(nested(depth))


def test_patterns_within_groups_without_end() -> None:
    with pytest.raises(InvalidRequest, match="groups within groups"):
        translated({"pattern": "(" * 5000 + ")" * 5000})


LARGE: dict[str, Any] = {
    "references into a chain": closed(
        **{f"p{i}": {"$ref": "#/properties/deep" + "/items" * i} for i in range(60)}, deep=nested(60)
    ),
    "unions of unions": {"oneOf": [{"oneOf": [{"minimum": i * 100 + j} for j in range(100)]} for i in range(30)]},
    "variants": {"oneOf": [closed(kind={"const": i}) for i in range(1500)]},
    "long names": {
        "properties": {"n" * 100_000: {"properties": {f"p{i}": {"uniqueItems": True} for i in range(3000)}}}
    },
    "pattern": {"pattern": "[^a](b|c)*" * 6000},
    "many patterns": {"patternProperties": {f"{i}a*": {} for i in range(3000)}},
    "chain of references": {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)} | {"d3000": {}},
    },
    "circle of references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
}


@pytest.mark.parametrize("schema", LARGE.values(), ids=LARGE)
def test_translation_takes_time_in_proportion(schema: Any) -> None:
    """In seconds of this thread, and far from what they take; what grows with the square takes minutes."""
    started_s = time.thread_time()
    found = translated(schema)
    assert time.thread_time() - started_s < 5
    assert all(len(check.schema) < 10 * len(json.dumps(schema)) + 100_000 for check in found.late_checks)


KEYWORDS = (
    *(
        "type",
        "enum",
        "const",
        "$ref",
        "$id",
        "id",
        "$anchor",
        "$schema",
        "$defs",
        "definitions",
        "nullable",
        "required",
    ),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "minProperties", "maxProperties"),
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas"),
    *("unevaluatedProperties", "unevaluatedItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "x-guidance", "$dynamicRef"),
)
LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2.0, 0.1, 1e300, 10**30, [], {}),
        *("", "a", "#", "#/$defs/a", "#a", "^a(?!b)", "[", "object", "string", "integer", "date", "uri-reference"),
        "http://json-schema.org/draft-04/schema#",
    ]
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=4),
    max_leaves=25,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS), TREES, max_size=5), answer=LEAVES, is_strict=st.booleans())
def test_any_json_is_translated_or_refused(schema: Any, answer: Any, is_strict: bool) -> None:
    try:
        found = translated(schema, is_strict=is_strict)
    except InvalidRequest as refused:
        assert str(refused).startswith(PARAM)
        return
    assert isinstance(json.loads(found.source), dict | bool)
    for check in found.late_checks:
        assert check_answer(check, json.dumps(answer)).outcome in Outcome


def test_too_many_schemas_are_refused() -> None:
    """Each reference into a part has the part copied."""
    wide: Any = {"properties": {f"p{i}": {"items": {"items": {}}} for i in range(20_000)}}
    with pytest.raises(InvalidRequest, match="20,000"):
        translated(wide)
    with pytest.raises(InvalidRequest, match="100,000 characters"):
        translated({"items": {"pattern": "a" * 60_000}, "allOf": [{"pattern": "b" * 60_000}]})


def test_there_are_200_schemas_and_they_are_the_same_every_time() -> None:
    graded = graded_schemas()
    assert len(graded) == 200 and graded == graded_schemas()
    assert len({json.dumps(item.schema) for item in graded}) > 180
    for item in graded:
        Draft202012Validator.check_schema(item.schema)
