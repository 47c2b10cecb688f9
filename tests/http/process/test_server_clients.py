"""A real server process and the official client: both calls, sync and async, and clients that leave."""

import asyncio
import json
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.fake_text_model import NAME
from tests.support.server_process import ServerProcess, eventually, running_server

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--num-slots", "8", "--step-s", "0.002") as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models_of_the_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "headrace"


def test_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole.usage is not None and whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_completion_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=NAME, prompt="once", max_tokens=20, temperature=0, logprobs=1)
    chunks = list(client.completions.create(model=NAME, prompt="once", max_tokens=20, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt="a", temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=NAME, prompt="a" * 300)
    assert too_long.value.code == "context_length_exceeded"


def test_32_streams_at_once_get_what_each_gets_alone(server: ServerProcess, client: openai.OpenAI) -> None:
    prompts = [f"prompt number {number}" for number in range(32)]
    alone = [
        client.completions.create(model=NAME, prompt=prompt, max_tokens=24, temperature=1, seed=5).choices[0].text
        for prompt in prompts
    ]

    async def one(client: openai.AsyncOpenAI, prompt: str, *, is_stream: bool) -> str:
        if not is_stream:
            whole = await client.completions.create(model=NAME, prompt=prompt, max_tokens=24, temperature=1, seed=5)
            return whole.choices[0].text
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=24, temperature=1, seed=5, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(one(client, p, is_stream=i % 4 != 0) for i, p in enumerate(prompts)))

    assert asyncio.run(all_at_once()) == alone


def send(server: ServerProcess, **fields: object) -> socket.socket:
    """A request written to a bare socket, so that the test decides when to hang up."""
    address = urlsplit(server.url)
    body = json.dumps({"model": NAME, "prompt": "once", "max_tokens": 200, "ignore_eos": True, **fields})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=20)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


@pytest.fixture(scope="module")
def slow_server() -> Iterator[ServerProcess]:
    """A request of 200 tokens takes 20 s here, so that a slot is free early only if somebody freed it."""
    with running_server("--num-slots", "2", "--step-s", "0.1", "--max-waiting", "3") as process:
        yield process


@contextmanager
def hung_up(connections: Iterable[socket.socket]) -> Iterator[list[socket.socket]]:
    """Connections that are closed in the end, whatever the server has still to say."""
    opened = list(connections)
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


def num_live(server: ServerProcess) -> float:
    return server.metric("headrace_requests_running") + server.metric("headrace_requests_waiting")


@pytest.mark.parametrize("is_stream", [True, False])
def test_slots_of_clients_that_hang_up_are_freed(slow_server: ServerProcess, *, is_stream: bool) -> None:
    """Two that run, of which the streaming one has read something, and two that wait."""
    with hung_up(send(slow_server, stream=is_stream) for _ in range(4)) as connections:
        eventually(lambda: num_live(slow_server) == 4, "four requests in the engine")
        if is_stream:
            readable, _, _ = select.select(connections, [], [], 20)
            assert b"200 OK" in readable[0].recv(100)
    eventually(lambda: num_live(slow_server) == 0, "all four cancelled")
    assert httpx.get(f"{slow_server.url}/readyz").status_code == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_stray_byte_before_the_end_hides_nothing(slow_server: ServerProcess, *, is_stream: bool) -> None:
    """A line end, or the beginning of a next request: bytes that nobody reads stand before the connection's end."""
    with hung_up(send(slow_server, stream=is_stream) for _ in range(4)) as connections:
        eventually(lambda: num_live(slow_server) == 4, "four requests in the engine")
        for number, connection in enumerate(connections):
            connection.sendall(b"\n" if number % 2 else b"GET / HTTP/1.1\r\n")
    eventually(lambda: num_live(slow_server) == 0, "all four cancelled")


def test_a_full_queue_is_refused_at_once(slow_server: ServerProcess) -> None:
    body = {"model": NAME, "prompt": "once"}
    with hung_up(send(slow_server) for _ in range(5)):
        eventually(lambda: num_live(slow_server) == 5, "the queue is full")
        for _ in range(3):
            response = httpx.post(f"{slow_server.url}/v1/completions", json=body)
            assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1
    eventually(lambda: num_live(slow_server) == 0, "all cancelled")


def test_one_of_many_choices_is_never_left_behind(slow_server: ServerProcess) -> None:
    with hung_up([send(slow_server, n=3, stream=True)]):
        eventually(lambda: num_live(slow_server) == 3, "three choices in the engine")
    eventually(lambda: num_live(slow_server) == 0, "all cancelled")


class Person(BaseModel):
    """What the client is asked to parse."""

    name: str
    is_tall: bool


def test_an_answer_is_parsed_into_a_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=NAME,
        messages=MESSAGES,
        response_format=Person,
        temperature=0,
        extra_body={"logit_bias": {"1": 40}},  # byte 1 is the quotation mark: names end soon
    )
    assert isinstance(answer.choices[0].message.parsed, Person)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=MESSAGES, extra_body={"structured_outputs": {"regex": "("}})
    assert refused.value.param == "structured_outputs.regex"


def test_prompt_scores_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=NAME, prompt="once", echo=True, logprobs=1, max_tokens=0)
    stream = client.completions.create(
        model=NAME, prompt="once", echo=True, logprobs=1, max_tokens=2, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert whole.choices[0].logprobs is not None and chunks[0].logprobs is not None
    assert chunks[0].text == "once"
    assert chunks[0].logprobs.token_logprobs == whole.choices[0].logprobs.token_logprobs
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt="once", max_tokens=0)
    assert refused.value.param == "max_tokens"
