"""The three classes of request fields: every row of the tables over HTTP, in the README, the header and the metric."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from serve.api.openapi import document
from serve.app import create_app
from serve.fields.checks import string
from serve.fields.foreign import (
    CALL,
    CALLED,
    CHAT,
    CHOICE,
    COMPLETION,
    DETOKENIZE,
    FUNCTION,
    IGNORED,
    JSON_SCHEMA,
    MESSAGE,
    PART,
    REFUSED,
    REQUEST,
    RESPONSE_FORMAT,
    STREAM_OPTIONS,
    STRUCTURED,
    TABLES,
    TOKENIZE,
    TOOL,
    table,
)
from serve.fields.ignored import HEADER, KNOWN, MAX_HEADER_CHARS, header_text
from serve.fields.reading import Field, FieldClass
from serve.settings import ServerSettings
from tests.support.fake_text_model import NAME, fake_text_model

Json = dict[str, Any]
README = (Path(__file__).parents[3] / "serve" / "README.md").read_text()
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
RESULT = {"role": "tool", "content": "12", "tool_call_id": "1"}


def completion(**fields: Any) -> tuple[str, Json]:
    return COMPLETIONS, {"model": NAME, "prompt": "a", "max_tokens": 1, **fields}


def chat(**fields: Any) -> tuple[str, Json]:
    return CHATS, {"model": NAME, "messages": [USER], "max_tokens": 1, **fields}


def called(call: Json, **function: Any) -> tuple[str, Json]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", **function}, **call}
    return chat(messages=[USER, {"role": "assistant", "tool_calls": [call]}, RESULT])


def tools(tool: Json, **function: Any) -> Json:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}, **tool}]}


def form(**fields: Any) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, **fields}}


def request_with(place: str, extra: Json) -> tuple[str, Json]:
    """A good request with more fields at a place."""
    requests: dict[str, Any] = {
        REQUEST: lambda: completion(**extra),
        COMPLETION: lambda: completion(**extra),
        CHAT: lambda: chat(**extra),
        TOKENIZE: lambda: ("/tokenize", {"prompt": "a", **extra}),
        DETOKENIZE: lambda: ("/detokenize", {"tokens": [1], **extra}),
        STREAM_OPTIONS: lambda: chat(stream=True, stream_options=extra),
        STRUCTURED: lambda: chat(structured_outputs={"choice": ["a"], **extra}),
        RESPONSE_FORMAT: lambda: chat(response_format={"type": "text", **extra}),
        JSON_SCHEMA: lambda: chat(response_format=form(**extra)),
        MESSAGE: lambda: chat(messages=[USER, {"role": "assistant", "content": "a", **extra}, USER]),
        PART: lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a", **extra}]}]),
        CALL: lambda: called(extra),
        CALLED: lambda: called({}, **extra),
        TOOL: lambda: chat(**tools(extra)),
        FUNCTION: lambda: chat(**tools({}, **extra)),
        CHOICE: lambda: chat(**tools({}), tool_choice={"type": "auto", **extra}),
    }
    path, body = requests[place]()
    return path, dict(body)


def noted(place: str, name: str) -> str:
    return name if place in (REQUEST, CHAT, COMPLETION, TOKENIZE, DETOKENIZE) else f"{place}.{name}"


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    model = fake_text_model(capacity=1024)
    model.start()
    yield create_app(model).test_client()
    model.close()


@pytest.fixture(scope="module")
def strict() -> Iterator[FlaskClient]:
    model = fake_text_model(capacity=1024)
    model.start()
    yield create_app(model, ServerSettings(strict_fields=True)).test_client()
    model.close()


def ignored(client: FlaskClient, path: str, body: Json) -> list[str]:
    """The names in the header of a good reply."""
    response = client.post(path, json=body, buffered=True)
    assert response.status_code == 200, (body, response.text)
    header = response.headers.get(HEADER, "")
    return header.split(", ") if header else []


def rows(tables: Any) -> list[tuple[str, Field]]:
    return [(place, row) for place, found in tables.items() for row in found]


def neutral(row: Field) -> list[Any]:
    """The values that a refused row takes, null among them."""
    return list(row.check.schema["enum"])  # type: ignore[attr-defined]  # `described` puts it there


def test_every_place_has_a_request() -> None:
    assert {*TABLES, REQUEST} >= {*IGNORED, *REFUSED}
    for place in (*TABLES, REQUEST):
        request_with(place, {})


@pytest.mark.parametrize("place", IGNORED)
def test_fields_without_effect_pass_with_any_value_and_are_named_in_the_header(client: FlaskClient, place: str) -> None:
    for value in (None, True, {"any": ["thing"]}):
        extra = {row.name: value for row in IGNORED[place]}
        names = ignored(client, *request_with(place, extra))
        assert names[:20] == [noted(place, name) for name in extra][:20]


@pytest.mark.parametrize("place", REFUSED)
def test_refused_fields_pass_at_their_neutral_values(client: FlaskClient, place: str) -> None:
    for values in itertools.zip_longest(*(neutral(row) for row in REFUSED[place])):
        extra = {row.name: value for row, value in zip(REFUSED[place], values, strict=True)}
        path, body = request_with(place, extra)
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers[HEADER] == header_text(noted(place, name) for name in extra)


@pytest.mark.parametrize(("place", "row"), rows(REFUSED), ids=lambda value: getattr(value, "name", value))
def test_a_refused_field_is_named_in_the_error(client: FlaskClient, place: str, row: Field) -> None:
    path, body = request_with(place, {row.name: {"some": "thing"}})
    response = client.post(path, json=body)
    error = response.get_json()["error"]
    assert response.status_code == 400 and error["code"] == "unsupported_parameter"
    assert re.sub(r"\[\d+\]", "[]", error["param"]) == noted(place, row.name)
    assert row.name in error["message"] and "an object of 1 fields" in error["message"]


@pytest.mark.parametrize("place", [*TABLES, REQUEST])
def test_unknown_names_are_taken_and_named_and_refused_if_asked(
    client: FlaskClient, strict: FlaskClient, place: str
) -> None:
    path, body = request_with(place, {"no_such_field": 1, "nothing": None})
    assert ignored(client, path, body) == [noted(place, "no_such_field"), noted(place, "nothing")]
    response = strict.post(path, json=body)
    error = response.get_json()["error"]
    assert response.status_code == 400 and error["code"] == "unknown_parameter"
    assert re.sub(r"\[\d+\]", "[]", error["param"]) == noted(place, "no_such_field")
    path, body = request_with(place, {"nothing": None})
    assert ignored(strict, path, body) == [noted(place, "nothing")]


def test_strict_takes_what_is_known_to_have_no_effect(strict: FlaskClient) -> None:
    assert ignored(strict, *completion(metadata={"a": "b"}, mirostat=0)) == ["metadata", "mirostat"]


def test_numbers_are_equal_as_in_json(client: FlaskClient) -> None:
    assert ignored(client, *completion(length_penalty=1)) == ["length_penalty"]
    assert ignored(client, *completion(num_beams=1.0)) == ["num_beams"]
    assert client.post(COMPLETIONS, json=completion(num_beams=True)[1]).status_code == 400


def test_a_reply_without_ignored_fields_has_no_header(client: FlaskClient) -> None:
    assert ignored(client, *chat(temperature=None)) == []


def test_streams_have_the_header_and_indices_do_not_multiply_it(client: FlaskClient) -> None:
    turns = [{"role": "assistant", "content": "a", "parsed": idx} for idx in range(9)]
    assert ignored(client, *chat(messages=[*turns, USER], stream=True)) == ["messages[].parsed"]


def test_stream_options_without_a_stream_are_ignored(client: FlaskClient) -> None:
    assert ignored(client, *chat(stream_options={"include_usage": True})) == ["stream_options"]


def test_names_cannot_harm_the_header(client: FlaskClient) -> None:
    evil = "a\r\nSet-Cookie: b=c, \u00e9\ud800"
    (name,) = ignored(client, *completion(**{evil: 1}))
    assert name == "a??Set-Cookie??b?c????"
    many = {f"field_number_{idx}": idx for idx in range(5000)}
    header = client.post(COMPLETIONS, json=completion(**many)[1]).headers[HEADER]
    assert len(header) <= MAX_HEADER_CHARS and header.endswith(", ...") and header.isascii()
    assert header_text(["x" * 10_000]) == "x" * 100


def test_the_metric_counts_names_of_the_tables_and_others_together() -> None:
    model = fake_text_model()
    model.start()
    client = create_app(model).test_client()
    ignored(client, *completion(metadata=1, user="u", invented=1, invented_2=1))
    ignored(client, *chat(metadata=1, messages=[{**USER, "parsed": 1}]))
    text = client.get("/metrics").get_data(as_text=True)
    model.close()
    counts = dict(re.findall(r'^headrace_ignored_fields_total\{field="([^"]+)"\} (\S+)$', text, re.MULTILINE))
    assert counts == {"metadata": "2.0", "user": "1.0", "messages[].parsed": "1.0", "other": "2.0"}
    assert len(KNOWN) < 400


def test_a_name_cannot_be_in_two_classes() -> None:
    before = dict(TABLES)
    with pytest.raises(AssertionError, match="parsed"):
        table(MESSAGE, Field("parsed", string))
    assert before == TABLES


def listed(heading: str) -> dict[str, set[str]]:
    """Names by place, as the README lists them below a heading."""
    section = README.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    items = re.findall(r"^- (.*(?:\n  .*)*)", section, re.MULTILINE)
    places = (re.sub(r"\s+", " ", item).partition(": ") for item in items)
    return {place.strip("`"): set(re.findall(r"`[^`]+`(?: \([^)]*\))?", names)) for place, _, names in places}


def written(row: Field) -> str:
    """A row as the README has it: with the neutral values in brackets."""
    values = neutral(row)[:-1] if row.kind is FieldClass.REFUSED else []
    shown = ", ".join(f"`{json.dumps(value)}`" for value in values)
    return f"`{row.name}` ({shown})" if shown else f"`{row.name}`"


def test_the_readme_lists_every_row_and_no_other() -> None:
    supported = {
        place: {f"`{row.name}`" for row in found if row.kind is FieldClass.SUPPORTED} for place, found in TABLES.items()
    }
    both = supported[CHAT] & supported[COMPLETION]
    supported |= {"both requests": both, CHAT: supported[CHAT] - both, COMPLETION: supported[COMPLETION] - both}
    assert listed("Supported") == supported
    for heading, tables in (("Ignored", IGNORED), ("Refused", REFUSED)):
        expected = {place: {written(row) for row in found} for place, found in tables.items()}
        expected["both requests"] = expected.pop(REQUEST)
        assert listed(heading) == expected


def test_the_document_tells_the_classes() -> None:
    schemas = document()["components"]["schemas"]
    strict_schemas = document(is_strict=True)["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert schemas[name]["additionalProperties"] is True
        assert strict_schemas[name]["additionalProperties"] is False
    properties = schemas["ChatCompletionRequest"]["properties"]
    assert "Ignored" in properties["metadata"]["description"]
    assert properties["modalities"]["enum"] == [["text"], [], None]
    message = properties["messages"]["items"]
    assert message["properties"].keys() == {row.name for row in TABLES[MESSAGE]}
    strict_message = strict_schemas["ChatCompletionRequest"]["properties"]["messages"]["items"]
    assert (message["additionalProperties"], strict_message["additionalProperties"]) == (True, False)
