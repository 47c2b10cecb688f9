"""Tool calling through the official client, whole and streamed, sync and async; and prompts of turns with tools.

Forced calls come from a model that would say anything; free ones from a model that says a script.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

from runtime.text.chat.template import ChatTemplate
from runtime.text.tools.formats import GENERIC, HERMES, TOOL_FORMATS, Tool, plain_messages
from runtime.text_model import TextModel
from serve.app import create_app
from tests.support.fake_text_model import NAME, fake_text_model
from tests.support.server_process import ServerProcess, running_server

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
PARAMETERS: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock", "strict": True}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "go"}]
SCRIPT = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
SCRIPT += '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
WEATHER_CALL = ("get_weather", {"city": "Rome", "days": 2})


def calls_of(message: Any) -> list[tuple[str, Json]]:
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


def check_call(name: str, arguments: Json) -> None:
    schema = PARAMETERS if name == "get_weather" else {"maxProperties": 0}
    Draft202012Validator(schema).validate(arguments)


@pytest.fixture(scope="module")
def scripted() -> Iterator[ServerProcess]:
    flags = ("--num-slots", "4", "--capacity", "1024", "--script", SCRIPT, "--tool-format", "hermes")
    with running_server(*flags) as server:
        yield server


@pytest.fixture
def client(scripted: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_free_calls_of_the_official_client(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    assert calls_of(choice.message) == [WEATHER_CALL, ("clock", {})]


def test_streamed_calls_are_the_same_and_come_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    parts = [call for delta in deltas for call in delta.tool_calls or []]
    assert [part.index for part in parts] == sorted(part.index for part in parts)
    heads = [part for part in parts if part.id]
    assert [part.function.name for part in heads if part.function] == ["get_weather", "clock"]
    first = [part.function.arguments or "" for part in parts if part.index == 0 and part.function]
    assert json.loads("".join(first)) == WEATHER_CALL[1] and len(first) > 10, "a byte a token, so many pieces"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_clients_own_stream_helper_puts_calls_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=NAME, messages=MESSAGES, tools=[TOOLS[0], TOOLS[1]]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert calls_of(message)[0] == WEATHER_CALL


def test_the_async_client(scripted: ServerProcess) -> None:
    async def both() -> tuple[Any, str]:
        async with openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="unused", max_retries=0) as client:
            whole = await client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS)
            stream = await client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS, stream=True)
            chunks = [chunk async for chunk in stream]
        parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or [] if part.index == 0]
        return whole.choices[0].message, "".join(part.function.arguments or "" for part in parts if part.function)

    message, streamed = asyncio.run(both())
    assert calls_of(message)[0] == WEATHER_CALL and json.loads(streamed) == WEATHER_CALL[1]


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI) -> None:
    """The reply is appended as the client has it, with the result, as every agent loop does."""
    message = client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS).choices[0].message
    assert message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    turns: list[Any] = [*MESSAGES, message, *results]
    again = client.chat.completions.create(model=NAME, messages=turns, tools=TOOLS, tool_choice="none")
    assert again.choices[0].message.content == SCRIPT and not again.choices[0].message.tool_calls


def test_without_tools_the_text_is_left_alone(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model=NAME, messages=MESSAGES).choices[0]
    assert choice.message.content == SCRIPT and choice.finish_reason == "stop"


@pytest.fixture(params=TOOL_FORMATS)
def app(request: pytest.FixtureRequest) -> Iterator[tuple[TextModel, FlaskClient]]:
    """A model that says anything, for each format."""
    model = fake_text_model(num_slots=8, capacity=2048, tool_format=request.param)
    model.start()
    yield model, create_app(model).test_client()
    model.close()


def ask(app: tuple[TextModel, FlaskClient], **fields: Any) -> Json:
    body = {"model": NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 1000, "temperature": 1, **fields}
    response = app[1].post(CHAT, json=body)
    assert response.status_code == 200, response.text
    choice: Json = response.get_json()["choices"][0]
    return choice


@pytest.mark.parametrize("seed", range(3))
def test_forced_calls_follow_their_schemas(app: tuple[TextModel, FlaskClient], seed: int) -> None:
    choice = ask(app, tool_choice="required", seed=seed)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    for call in choice["message"]["tool_calls"]:
        check_call(call["function"]["name"], json.loads(call["function"]["arguments"]))


def test_a_named_function_is_called_once(app: tuple[TextModel, FlaskClient]) -> None:
    choice = ask(app, tool_choice={"type": "function", "function": {"name": "get_weather"}}, seed=1)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and call["type"] == "function"
    check_call("get_weather", json.loads(call["function"]["arguments"]))


def test_parallel_calls_can_be_switched_off(app: tuple[TextModel, FlaskClient]) -> None:
    numbers = {len(ask(app, tool_choice="required", seed=seed)["message"]["tool_calls"]) for seed in range(6)}
    assert max(numbers) > 1, "some answer has several calls"
    for seed in range(6):
        choice = ask(app, tool_choice="required", parallel_tool_calls=False, seed=seed)
        assert len(choice["message"]["tool_calls"]) == 1


def test_several_choices_and_log_probabilities(app: tuple[TextModel, FlaskClient]) -> None:
    body = {"model": NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 300, "tool_choice": "required"}
    answer = app[1].post(CHAT, json={**body, "n": 3, "seed": 2, "logprobs": True}).get_json()
    assert len(answer["choices"]) == 3
    num_logprobs = sum(len(choice["logprobs"]["content"]) for choice in answer["choices"])
    assert num_logprobs == answer["usage"]["completion_tokens"]
    assert all(choice["message"]["tool_calls"] for choice in answer["choices"])


def test_a_call_that_is_cut_short_says_so(app: tuple[TextModel, FlaskClient]) -> None:
    choice = ask(app, tool_choice="required", max_tokens=30, seed=1)
    assert choice["finish_reason"] == "length"


WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}[{{ tool.function.name }} {{ tool.function.parameters | tojson }}]"
    "{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls %}({{ call.function.name }} {{ call.function.arguments.city }}){% endfor %}"
    "{% endfor %}"
)
TURNS: list[Json] = [
    {"role": "user", "content": "go"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
]
TOOL = Tool(name="w", description="d", parameters={"type": "object"})


def test_a_template_that_knows_tools_gets_them_with_arguments_as_objects() -> None:
    template = ChatTemplate(WITH_TOOLS, {})
    assert template.knows_tools
    text = template.render(TURNS, tools=[TOOL.as_json()])
    assert text == '[w {"type": "object"}]<user>go<assistant>(w Rome)<tool>sunny'
    assert template.render(TURNS[:1]) == "<user>go"


def test_a_template_that_knows_none_is_told_in_plain_words() -> None:
    assert not ChatTemplate("{{ messages[0].content }}", {}).knows_tools
    messages = plain_messages([{"role": "system", "content": "Be kind."}, *TURNS], [TOOL], GENERIC)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be kind.\n\nYou can call these functions")
    assert '{"name": "w", "description": "d", "parameters": {"type": "object"}}' in messages[0]["content"]
    assert messages[2]["content"] == '{"name": "w", "arguments": {"city": "Rome"}}'
    assert messages[3]["content"] == "Result of w: sunny"
    assert plain_messages(TURNS, [TOOL], HERMES)[2]["content"].startswith("<tool_call>\n{")
    assert plain_messages(TURNS[:1], [], GENERIC) == TURNS[:1]
