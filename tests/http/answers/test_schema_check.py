"""The check of complete answers: what it finds, when it gives up, and what a reply says of it."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from runtime.core import LateCheck
from runtime.grammar.schema.check import Outcome, check_answer
from runtime.grammar.schema.translation import translate_schema
from serve.app import create_app
from serve.replies.unenforced import CHECK_HEADER, MAX_HEADER_CHARS, UNENFORCED_HEADER, unenforced
from tests.support.fake_text_model import NAME, fake_text_model
from tests.support.schemas.wild import closed, value

Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def late_check(schema: Any) -> LateCheck:
    (check,) = translate_schema(schema, param="x", is_strict=False).late_checks
    return check


# schema, answers that pass, answers that fail and a word of what is said
FOUND: list[tuple[Any, list[Any], list[tuple[Any, str]]]] = [
    ({"uniqueItems": True}, [[1, True, "1"], [[1], [2]], 5], [([1, 1.0], "not all different"), ([{"a": 1}] * 2, "")]),
    ({"multipleOf": 0.1, "not": {"const": 7}}, [0.3, "x", True], [(0.35, "not a multiple"), (7, "")]),
    ({"pattern": "^(?!a).$"}, ["b", 1], [("a", "does not match"), ("b\n", "")]),
    (
        {"not": {"const": 0}, "patternProperties": {"^(?!x)": {"type": "integer"}}, "additionalProperties": False},
        [{"a": 1}, []],
        [({"a": "b"}, "/a: 'b' is not of type"), ({"x": 1}, "'x' is not one of its properties")],
    ),
    (
        {
            "$defs": {"b": {"properties": {"b": {}}}},
            "allOf": [{"properties": {"a": {}}}, {"$ref": "#/$defs/b"}, {"patternProperties": {"^x": {}}}],
            "anyOf": [{"properties": {"c": {"const": 1}}}, {"properties": {"d": {"const": 1}}, "required": ["d"]}],
            "if": {"properties": {"e": {"const": 1}}, "required": ["e"]},
            "then": {"properties": {"f": {}}},
            "else": {"properties": {"g": {}}},
            "dependentSchemas": {"a": {"properties": {"h": {}}}},
            "unevaluatedProperties": {"type": "null"},
        },
        [
            {"a": 1, "b": 1, "x": 1, "c": 1, "h": 1},
            {"d": 1, "g": 1},
            {"e": 1, "f": 1},
            {"z": None},
        ],
        [({"z": 1}, "/z: 1 is not of type 'null'"), ({"h": 1}, "/h"), ({"e": 1, "g": 1}, "/g"), ({"f": 1}, "/f")],
    ),
    (
        {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "not": {"required": ["m"]}}}},
        [{"n": {"n": {}}}],
        [({"n": {"n": {"m": 1}}}, "/n/n")],
    ),
    ({"not": {"format": "date"}}, ["x"], [("2026-01-02", ""), (1, "")]),
    (value({"contains": {"const": 1}}), [{"v": [0, 1]}], [({"v": [0]}, "/v")]),
    ({"additionalProperties": {"uniqueItems": True}}, [{"a": []}], [({"a~/b": [1, 1]}, "/a~0~1b: ")]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), FOUND)
def test_the_check_finds_each_kind_of_problem(schema: Any, good: list[Any], bad: list[tuple[Any, str]]) -> None:
    check = late_check(schema)
    for answer in good:
        assert check_answer(check, json.dumps(answer)).outcome is Outcome.PASSED, answer
    for answer, words in bad:
        result = check_answer(check, json.dumps(answer))
        assert result.outcome is Outcome.FAILED and words in result.problems[0], (answer, result)


def test_a_few_problems_are_told_in_short() -> None:
    result = check_answer(late_check({"items": {"not": {"type": "string"}}}), json.dumps(["x" * 1000] * 9))
    assert len(result.problems) == 3 and all(len(problem) < 300 for problem in result.problems)


DOUBLING = {
    "$ref": "#/$defs/d0",
    "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    | {"d60": {"not": {"const": 1}}},
}
NESTED = {"$ref": "#/$defs/n", "$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (DOUBLING, "1"),
        ({"pattern": r"^(?!x)(?:a|aa)+[bc]$"}, json.dumps("a" * 60)),
        (NESTED, "[" * 900 + "]" * 900),
        (NESTED, "[[], "),
        ({"not": {"pattern": r"\p{Nothing}"}}, '"a"'),
        ({"not": {"multipleOf": 3}}, "1" * 5000),
        ({"multipleOf": 0.3, "not": {}, "uniqueItems": True} | {"not": {"const": 1}}, "1e999"),
    ],
)
def test_a_check_that_takes_too_long_or_a_cut_answer_has_no_verdict(schema: Any, text: str) -> None:
    started_s = time.thread_time()
    assert check_answer(late_check(schema), text, limit_s=0.2).outcome is Outcome.NOT_DONE
    assert time.thread_time() - started_s < 5


def test_a_long_answer_of_objects_is_compared_in_time() -> None:
    answer = json.dumps([{"number": number, "even": number % 2 == 0} for number in range(20_000)])
    assert check_answer(late_check({"uniqueItems": True}), answer, limit_s=60).outcome is Outcome.PASSED


def test_the_header_is_short_and_plain() -> None:
    names = ["a, b", "naïve", "x\r\nX-Evil: 1", "per%cent", "p/q", "\U0001f600", "n" * 5000]
    check = late_check({"properties": {name: {"uniqueItems": True} for name in names}})
    header = unenforced([check])
    assert header is not None and header.isascii() and header.isprintable() and "\n" not in header
    assert header.split(", ")[:2] == ["/properties/a%2C%20b/uniqueItems", "/properties/na%C3%AFve/uniqueItems"]
    assert "/properties/p~1q/uniqueItems" in header and "..." in header
    many = late_check({"properties": {"ä" * 90 + str(number): {"uniqueItems": True} for number in range(500)}})
    header = unenforced([many, check])
    assert header is not None and len(header) < MAX_HEADER_CHARS + 30 and header.endswith(" more")
    assert unenforced([]) is None


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    model = fake_text_model(num_slots=8, capacity=2048)
    model.start()
    yield create_app(model).test_client()
    model.close()


# The fake model writes anything that the grammar allows: these leave it no choice.
TWICE = closed(t={"type": "array", "items": {"const": "a"}, "minItems": 2, "maxItems": 2, "uniqueItems": True})
ONCE = closed(t={"enum": ["a"], "not": {"const": "b"}})


def ask(client: FlaskClient, path: str, **fields: Any) -> Any:
    start: Json = {"prompt": "go"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "go"}]}
    return client.post(path, json={"model": NAME, "max_tokens": 400, "seed": 1, **start, **fields})


def form(schema: Any, **more: Any) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}}


def tools(*schemas: Any, **more: Any) -> Json:
    functions = [{"name": f"f{idx}", "parameters": schema, **more} for idx, schema in enumerate(schemas)]
    return {"tools": [{"type": "function", "function": function} for function in functions], "tool_choice": "required"}


def streamed(response: Any) -> list[Json]:
    events = response.get_data(as_text=True).split("\n\n")[:-2]
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("schema", "place", "outcome"),
    [(TWICE, "/properties/t/uniqueItems", "failed"), (ONCE, "/properties/t/not", "passed")],
)
def test_a_reply_says_what_was_left_out_and_what_came_of_it(
    client: FlaskClient, path: str, schema: Any, place: str, outcome: str
) -> None:
    whole = ask(client, path, n=2, **form(schema))
    assert whole.status_code == 200 and whole.headers[UNENFORCED_HEADER] == place
    assert whole.headers[CHECK_HEADER] == outcome
    for choice in whole.get_json()["choices"]:
        assert choice["finish_reason"] == "stop" and choice["schema_check"]["outcome"] == outcome
        assert bool(choice["schema_check"]["problems"]) is (outcome == "failed")
    stream = ask(client, path, stream=True, **form(schema))
    assert stream.headers[UNENFORCED_HEADER] == place and CHECK_HEADER not in stream.headers
    pieces = streamed(stream)
    assert [piece for piece in pieces if "schema_check" in piece] == pieces[-1:]
    assert pieces[-1]["schema_check"]["outcome"] == outcome


@pytest.mark.parametrize("fields", [{"echo": True}, {"echo": True, "logprobs": 1}])
def test_an_echo_is_no_part_of_the_answer(client: FlaskClient, fields: Json) -> None:
    (choice,) = ask(client, COMPLETIONS, **fields, **form(ONCE)).get_json()["choices"]
    assert choice["text"].startswith("go{") and choice["schema_check"]["outcome"] == "passed"


def test_calls_are_checked_one_by_one(client: FlaskClient) -> None:
    reply = ask(client, CHAT, parallel_tool_calls=False, max_tokens=500, **tools(TWICE))
    (choice,) = reply.get_json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["schema_check"]["outcome"] == "failed"
    assert reply.headers[UNENFORCED_HEADER] == "f0:/properties/t/uniqueItems"
    reply = ask(client, CHAT, parallel_tool_calls=False, max_tokens=500, **tools(ONCE, ONCE), stream=True)
    assert reply.headers[UNENFORCED_HEADER] == "f0:/properties/t/not, f1:/properties/t/not"
    assert streamed(reply)[-1]["schema_check"] == {"outcome": "passed", "problems": []}


def test_an_answer_that_is_cut_is_not_judged(client: FlaskClient) -> None:
    reply = ask(client, CHAT, max_tokens=3, **form(TWICE))
    assert reply.headers[CHECK_HEADER] == "not_done"
    assert reply.get_json()["choices"][0]["schema_check"] == {"outcome": "not_done", "problems": []}


def test_nothing_is_said_where_the_grammar_holds_everything(client: FlaskClient) -> None:
    for fields in (form(closed(a={"const": 1})), tools(closed(a={"const": 1})), {}):
        reply = ask(client, CHAT, **fields)
        assert not {UNENFORCED_HEADER, CHECK_HEADER} & set(reply.headers)
        assert "schema_check" not in reply.get_json()["choices"][0]


@pytest.mark.parametrize("fields", [form(TWICE, strict=True), tools(TWICE, strict=True)])
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
def test_strict_is_kept_or_refused(client: FlaskClient, fields: Json, choice: Json) -> None:
    if choice and "tools" not in fields:
        return
    reply = ask(client, CHAT, **(fields | choice))
    error = reply.get_json()["error"]
    assert reply.status_code == 400 and "`uniqueItems` at /properties/t" in error["message"]
    assert error["param"] == ("tools[0].function.parameters" if "tools" in fields else "response_format")


@pytest.mark.parametrize(
    "parameters",
    [{"type": ["object", "null"], "nullable": True}, {"type": None, "properties": None, "maxProperties": 0}, {}],
)
def test_arguments_are_an_object_whatever_else_a_schema_allows(client: FlaskClient, parameters: Json) -> None:
    parameters = {"additionalProperties": False, **parameters}
    (choice,) = ask(client, CHAT, parallel_tool_calls=False, **tools(parameters)).get_json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {}


def test_a_json_schema_without_a_schema_is_any_object(client: FlaskClient) -> None:
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True}}}
    text = ask(client, CHAT, max_tokens=8, **wanted).get_json()["choices"][0]["message"]["content"]
    assert text.startswith("{")


def test_checks_are_counted(client: FlaskClient) -> None:
    def count(outcome: str) -> float:
        for line in client.get("/metrics").get_data(as_text=True).splitlines():
            if line.startswith(f'headrace_schema_checks_total{{outcome="{outcome}"}}'):
                return float(line.split()[-1])
        raise AssertionError(outcome)

    before = {outcome: count(outcome) for outcome in ("passed", "failed", "not_done")}
    ask(client, CHAT, n=3, **form(TWICE)).close()
    stream = ask(client, CHAT, **form(ONCE), stream=True)
    stream.get_data()
    stream.close()
    after = {outcome: count(outcome) - number for outcome, number in before.items()}
    assert after == {"passed": 1, "failed": 3, "not_done": 0}
