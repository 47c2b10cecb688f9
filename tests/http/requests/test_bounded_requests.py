"""Requests that cost too much: long texts, stop strings and scores are refused before the work; time runs out."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from runtime.core import MAX_STOP_CHARS, SamplingParams
from runtime.errors import InvalidRequest
from runtime.text.stop_strings import StopStrings, prepared
from runtime.text_model import TextModel
from serve.access.api_keys import KeyRing, make_key
from serve.access.middleware import Access
from serve.api.completions import MAX_SCORED
from serve.api.tokenize import MIN_DETOKENIZED
from serve.app import create_app
from tests.support.fake_text_model import NAME, fake_text_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = "a" * 4_000_000
USER = {"role": "user", "content": LONG}


@pytest.fixture(scope="module")
def model() -> Iterator[TextModel]:
    model = fake_text_model()
    model.start()
    yield model
    model.close()


@pytest.fixture
def client(model: TextModel) -> FlaskClient:
    return create_app(model).test_client()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": LONG}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", LONG]}, "prompt"),
        (CHAT, {"messages": [USER]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "<" + LONG}]}, "messages"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"messages": [USER]}, "messages"),
    ],
)
def test_a_text_that_cannot_fit_is_refused_by_its_length(
    client: FlaskClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json={"model": NAME, **body})
    error = response.get_json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded" and error["param"] == param
    assert re.search(r"the text has 4,000,\d+ bytes, and 256 tokens hold at most 2,304", error["message"])


def test_more_choices_than_fit_are_refused_before_a_text_is_looked_at(client: FlaskClient) -> None:
    """Each of these texts would be refused for its own length."""
    response = client.post(COMPLETIONS, json={"model": NAME, "prompt": ["a" * 3_000] * 33})
    assert "33 choices; a request may have at most 32" in response.get_json()["error"]["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stop_string_has_a_longest_length(client: FlaskClient, path: str) -> None:
    body = {"model": NAME, "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    body.pop("messages" if path == COMPLETIONS else "prompt")
    assert client.post(path, json=body | {"stop": ["b" * MAX_STOP_CHARS]}).status_code == 200
    for stop in (LONG, ["a", "b" * (MAX_STOP_CHARS + 1)]):
        response = client.post(path, json=body | {"stop": stop})
        error = response.get_json()["error"]
        assert response.status_code == 400 and error["param"] == "stop"
        assert re.search(r"characters; at most 1,000 are taken", error["message"])


def test_choices_share_the_tables_of_their_stop_strings() -> None:
    params = SamplingParams(stop=("abab", "b" * MAX_STOP_CHARS))
    first, second = StopStrings(params.stop), StopStrings(list(params.stop))
    assert first._stops is second._stops is prepared(params.stop)
    assert [list(stop.suffixes[:5]) for stop in first._stops] == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3]]
    with pytest.raises(InvalidRequest, match="1,001 characters"):
        SamplingParams(stop=("c" * 1001,))


def test_the_scores_of_one_request_are_bounded() -> None:
    model = fake_text_model(capacity=2**15, num_slots=1, max_waiting=64)
    client = create_app(model).test_client()  # not started: what is not refused would never be answered
    prompt, n = [1] * (2**15 - 1), 16
    body = {"model": NAME, "prompt": prompt, "n": n, "echo": True, "logprobs": 1, "max_tokens": 1}
    response = client.post(COMPLETIONS, json=body)
    error = response.get_json()["error"]
    assert response.status_code == 400 and error["param"] == "logprobs"
    assert f"are {2 * n * len(prompt):,}; a reply has at most {MAX_SCORED:,}" in error["message"]
    model.close()


def test_tokenizing_counts_against_a_key() -> None:
    keys = KeyRing([make_key("bob", "hr-bob", requests_per_minute=3)])
    model = fake_text_model()
    client = create_app(model, access=Access(keys)).test_client()
    headers = {"Authorization": "Bearer hr-bob"}
    answers = [
        client.post(path, json=body, headers=headers)
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})) * 2
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
    model.close()


def test_detokenizing_is_bounded(client: FlaskClient) -> None:
    response = client.post("/detokenize", json={"tokens": [97] * (MIN_DETOKENIZED + 1)})
    assert response.status_code == 400
    assert "65,537 token ids are too many; send at most 65,536" in response.get_json()["error"]["message"]
    assert client.post("/detokenize", json={"tokens": [97] * 300}).status_code == 200


SCRIPT = '[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]'
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
WANTS_NINE = """{% for m in messages %}{% for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}
{{- call.function.name + call.id + (call.function.arguments | tojson) }}{% endfor %}{{ m.content }}
{%- if m.tool_call_id and m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{% endfor %}
{%- if tools %}{{ '\\nassistant: ' }}{% endif %}"""


def test_a_conversation_with_calls_goes_three_turns_where_ids_have_nine_letters() -> None:
    model = fake_text_model(script=SCRIPT, capacity=1024, template=WANTS_NINE)
    model.start()
    client = create_app(model).test_client()
    foreign = {"id": "call_of_another_server", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [foreign]},
        {"role": "tool", "tool_call_id": foreign["id"], "content": "1"},
    ]
    for _ in range(3):
        response = client.post(CHAT, json={"model": NAME, "messages": messages, "tools": TOOLS, "max_tokens": 100})
        assert response.status_code == 200, response.text
        message = response.get_json()["choices"][0]["message"]
        ids = [call["id"] for call in message["tool_calls"]]
        assert len(set(ids)) == 2 and all(re.fullmatch(r"[A-Za-z0-9]{9}", call_id) for call_id in ids)
        messages += [message, *({"role": "tool", "tool_call_id": call_id, "content": "12"} for call_id in ids)]
    model.close()


def test_a_time_that_is_up_is_a_504_and_no_slot_in_time_a_503() -> None:
    model = fake_text_model(num_slots=1, step_s=0.02, max_queue_wait=0.1, request_timeout=30.0)
    model.start()
    client = create_app(model).test_client()
    body = {"model": NAME, "prompt": "once", "ignore_eos": True}
    late = client.post("/v1/completions", json={**body, "max_tokens": 200, "timeout": 0.05, "priority": 1})
    assert late.status_code == 504
    assert late.get_json()["error"]["code"] == "timeout"
    with model.generate([1], SamplingParams(max_tokens=200, temperature=0)):
        unserved = client.post("/v1/completions", json=body)
        assert unserved.status_code == 503
        assert "--max-queue-wait" in unserved.get_json()["error"]["message"]
        assert unserved.headers["Retry-After"]
    model.close()
