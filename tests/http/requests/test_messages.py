"""Chat messages as clients send them: what reaches the chat template, what is refused, and replies as history."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from flask import Flask
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from runtime.errors import InvalidRequest, UnsupportedField
from runtime.text.tools.formats import GENERIC, HERMES, TOOL_FORMATS, ToolFormat, plain_messages
from runtime.text.tools.parser import ToolCallParser
from serve.app import create_app
from serve.fields.messages import read_messages
from serve.fields.reading import Notes, reading
from tests.support.fake_text_model import NAME, fake_text_model

Json = dict[str, Any]
USER: Json = {"role": "user", "content": "hi"}
ARGUMENTS = '{"city": "Rome"}'


def call(**fields: Any) -> Json:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}, **fields}


def called(**function: Any) -> Json:
    """An assistant's turn with one call."""
    return {"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": "{}", **function})]}


def arguments(value: Any) -> Any:
    """What a call's arguments become."""
    return read_messages([called(arguments=value)])[0]["tool_calls"][0]["function"]["arguments"]


def last(*messages: Json) -> Json:
    return dict(read_messages([USER, *messages])[-1])


@pytest.mark.parametrize(
    "turn",
    [
        {},
        {"content": None},
        {"content": ""},
        {"content": []},
        {"content": [{"type": "text", "text": ""}]},
        {"content": None, "tool_calls": []},
        {"content": None, "tool_calls": None, "function_call": None, "audio": None},
        {"content": [{"type": "thinking", "thinking": "h", "signature": "s"}, {"type": "redacted_thinking"}]},
    ],
    ids=json.dumps,
)
def test_an_assistant_may_have_said_nothing(turn: Json) -> None:
    assert last({"role": "assistant", **turn}) == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["a", {"text": "b"}], "a\nb"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "a"),
    ],
)
def test_parts_that_are_text(content: Any, text: str) -> None:
    for role in ("user", "system", "assistant"):
        assert last({"role": role, "content": content})["content"] == text


@pytest.mark.parametrize(
    "kind",
    ["image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file", "tool_use", "thinking"],
)
def test_other_parts_are_refused_by_their_kind(kind: str) -> None:
    with pytest.raises(UnsupportedField, match=f'"{kind}" is not supported') as refused:
        read_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]}])
    assert refused.value.param == "messages[0].content[1]"


def test_what_an_assistant_thought_is_noted() -> None:
    parts = [{"type": "reasoning", "text": "h"}, {"type": "text", "text": "said"}]
    with reading() as notes:
        assert last({"role": "assistant", "content": parts})["content"] == "said"
    assert notes == Notes(ignored={"messages[].content[].reasoning": None})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (ARGUMENTS, {"city": "Rome"}),
        ({"city": "Rome"}, {"city": "Rome"}),
        ("", {}),
        (" \n", {}),
        ("null", {}),
        (None, {}),
        ('{"a"', '{"a"'),
        ("London", "London"),
        ("{'a': 1}", "{'a': 1}"),
        ('{"a": 1}{"b": 2}', '{"a": 1}{"b": 2}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("[" * 100_000, "[" * 100_000),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_arguments_of_earlier_calls(value: Any, expected: Any) -> None:
    assert arguments(value) == expected


@pytest.mark.parametrize("value", ['["x"]', "[]", "5", '"x"', "true", [], 5, True], ids=repr)
def test_arguments_that_are_json_of_another_kind_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        arguments(value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["[1]", '{"a": 1}', "{}", "5", "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(form=st.sampled_from([*TOOL_FORMATS.values()]), value=JSON, more=JSON, cut=st.integers(0, 120))
def test_what_the_parser_finds_comes_back(form: ToolFormat, value: Any, more: Any, cut: int) -> None:
    written = f'{form.opening}{{"name": "f", "arguments": {json.dumps(value)}, "parameters": {json.dumps(more)}}}'
    parser = ToolCallParser(form, ["f"])
    pieces = [*parser.push(written[:cut]), *parser.finish()]
    if parser.num_calls:
        assert isinstance(arguments("".join(piece.arguments for piece in pieces)), str | dict)


def test_calls_without_ids_and_types_and_results_by_order_and_name() -> None:
    calls = [{"function": {"name": name, "arguments": ""}, "type": None} for name in ("f", "g")]
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    results = [{"role": "tool", "content": "2", "name": "g"}, {"role": "tool", "content": None}]
    _, said, second, first = read_messages([USER, turn, *results])
    assert [item["id"] for item in said["tool_calls"]] == ["call_1_0", "call_1_1"]
    assert (second["tool_call_id"], first["tool_call_id"]) == ("call_1_1", "call_1_0")
    assert first == {"role": "tool", "content": "", "tool_call_id": "call_1_0"}
    with pytest.raises(InvalidRequest, match="no earlier call waits for a result"):
        read_messages([USER, turn, *results, {"role": "tool", "content": "3"}])


def test_openais_older_words() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ARGUMENTS}}
    _, said, result = read_messages([USER, turn, {"role": "function", "name": "f", "content": "sunny"}])
    (made,) = said["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"city": "Rome"}}
    assert result == {"role": "tool", "name": "f", "content": "sunny", "tool_call_id": made["id"]}
    alone = last({"role": "function", "name": "f", "content": "sunny"})
    assert alone["role"] == "tool" and alone["tool_call_id"]
    assert last({"role": "developer", "content": "Be brief."}) == {"role": "system", "content": "Be brief."}


def test_plain_words_quote_names_and_keep_text_arguments() -> None:
    result = {"role": "function", "name": "g", "content": "1"}
    plain = plain_messages(read_messages([USER, called(name='f"x', arguments="London"), result]), [], HERMES)
    assert plain[1]["content"] == '<tool_call>\n{"name": "f\\"x", "arguments": London}\n</tool_call>'
    assert plain[2]["content"] == "Result of g: 1"
    assert plain_messages(read_messages([called()]), [], GENERIC)[0]["content"] == '{"name": "f", "arguments": {}}'


ITEMS = "{% for c in messages[0].tool_calls %}{{ c.function.arguments.items() | list }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{% for c in messages[0].tool_calls %}{{ c.function.arguments }}{% endfor %}{{ tools }}", "LondonNone"),
        (ITEMS + "{{ tools }}", "[('_raw', 'London')]None"),
    ],
)
def test_templates_get_text_and_those_that_want_objects_get_one(source: str, prompt: str) -> None:
    model = fake_text_model(capacity=512, template=source)
    model.start()
    client = create_app(model).test_client()
    body = {"model": NAME, "messages": [called(arguments="London")], "max_tokens": 1}
    answer = client.post("/v1/chat/completions", json=body).get_json()
    model.close()
    assert answer["usage"]["prompt_tokens"] == len(prompt)


class Person(BaseModel):
    """What the official client makes of an answer in its form."""

    name: str = Field(max_length=8)


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    """A model that answers every chat with a call, cut or not, or a person."""
    model = fake_text_model(capacity=4096, tool_format="hermes", num_slots=2)
    model.start()
    yield create_app(model)
    model.close()


@pytest.fixture(scope="module")
def client(app: Flask) -> Iterator[openai.OpenAI]:
    transport = httpx.Client(transport=httpx.WSGITransport(app=app))
    with openai.OpenAI(base_url="http://localhost/v1", api_key="k", max_retries=0, http_client=transport) as client:
        yield client


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "server/look.up:now",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40, "minLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
MESSAGES: list[Any] = [{"role": "user", "content": "go"}]


def goes_on(client: openai.OpenAI, *turns: Any) -> None:
    """The conversation with these turns is answered."""
    messages: list[Any] = [*MESSAGES, *turns, USER]
    client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # the client's own, for what it parsed
def test_parsed_messages_of_the_official_client_come_back(client: openai.OpenAI) -> None:
    wanted: Json = {"model": NAME, "messages": MESSAGES, "max_tokens": 1000, "seed": 1}
    message = client.chat.completions.parse(**wanted, response_format=Person).choices[0].message
    assert isinstance(message.parsed, Person)
    goes_on(client, message)
    with client.chat.completions.stream(**wanted, response_format=Person) as stream:
        goes_on(client, stream.get_final_completion().choices[0].message)


def test_calls_of_the_official_client_come_back_whole_and_cut(client: openai.OpenAI) -> None:
    forced: Json = {"model": NAME, "messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "seed": 1}
    message = client.chat.completions.parse(**forced, max_tokens=3000, parallel_tool_calls=False).choices[0].message
    assert message.tool_calls and message.tool_calls[0].function.parsed_arguments
    goes_on(client, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "x"})
    choice = client.chat.completions.create(**forced, max_tokens=85).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls
    (cut,) = choice.message.tool_calls
    assert cut.type == "function" and cut.function.name == TOOL["function"]["name"]
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(cut.function.arguments)
    goes_on(client, choice.message, {"role": "tool", "tool_call_id": cut.id, "content": "x"})


@pytest.mark.parametrize("name", ["github/git_commit", "ns.sub", "mcp:server-1:do", "@scope/x$y", "a" * 128])
def test_names_of_tools(client: openai.OpenAI, name: str) -> None:
    tool: Any = {"type": "function", "function": {"name": name}}
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=1000
    )
    message = answer.choices[0].message
    assert message.tool_calls and message.tool_calls[0].type == "function"
    assert message.tool_calls[0].function.name == name and json.loads(message.tool_calls[0].function.arguments) == {}
    goes_on(client, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "x"})
