"""Log-probabilities of prompts over HTTP, in OpenAI's shape: with and without an answer, for several prompts."""

from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from serve.app import create_app
from tests.support.engine_requests import expected_logprob
from tests.support.fake_text_model import NAME, VOCAB_SIZE, fake_text_model

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    model = fake_text_model()
    model.start()
    yield create_app(model).test_client()
    model.close()


def ask(client: FlaskClient, **fields: Any) -> dict[str, Any]:
    response = client.post(COMPLETIONS, json={"model": NAME, "prompt": "once", "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.get_json()
    return answer


def test_the_prompt_alone(client: FlaskClient) -> None:
    answer = ask(client, echo=True, logprobs=2, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "once" and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("once") and logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert 2 <= len(top) <= 3 and value in top.values()
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 4


def test_the_prompt_and_what_follows(client: FlaskClient) -> None:
    whole = ask(client, echo=True, logprobs=0, max_tokens=3)["choices"][0]
    plain = ask(client, logprobs=0, max_tokens=3)["choices"][0]
    assert whole["text"] == "once" + plain["text"]
    assert whole["logprobs"]["token_logprobs"][4:] == plain["logprobs"]["token_logprobs"]
    assert whole["logprobs"]["tokens"] == [*"once", *plain["logprobs"]["tokens"]]
    assert whole["logprobs"]["text_offset"][4:] == [4 + offset for offset in plain["logprobs"]["text_offset"]]


def test_several_prompts_of_token_ids_as_evaluators_send_them(client: FlaskClient) -> None:
    prompts = [[10, 20, 30, 40], [50], [60] * 200]
    answer = ask(client, prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(prompt) + 1 and scores[0] is None
        expected = [expected_logprob(prompt[:i], prompt[i], VOCAB_SIZE) for i in range(1, len(prompt))]
        assert scores[1:-1] == pytest.approx(expected, abs=1e-5)


def test_echo_without_log_probabilities_and_nothing_generated(client: FlaskClient) -> None:
    (choice,) = ask(client, echo=True, max_tokens=0)["choices"]
    assert choice["text"] == "once" and choice["logprobs"] is None and choice["finish_reason"] == "length"
