"""Log-probabilities of prompts: right at every cut and in any company, in OpenAI's shape, and those of transformers."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from flask.testing import FlaskClient

import calibration_data
from runtime.artifact.manifest import Artifact
from runtime.core import FinishReason, SamplingParams, TokenEvent
from runtime.engine.engine import Engine
from runtime.errors import InvalidRequest
from runtime.settings import EngineSettings
from runtime.text_model import open_text_model
from serve.app import create_app
from tests.engine.test_engine import CAPACITY, VOCAB, add
from tests.real.test_real_model import oracle
from tests.support.fake_session import FakeSession, prefix_logits
from tests.support.fake_text_model import NAME, VOCAB_SIZE, fake_text_model
from tests.support.server_process import running_server

__all__ = ["oracle"]
COMPLETIONS = "/v1/completions"
TOLERANCE = 1e-3
"""Issue 5's figure, in nats."""


def expected_logprob(prefix: list[int], token_id: int, vocab_size: int) -> float:
    row = prefix_logits(np.array(prefix), vocab_size).astype(np.float64)
    return float(row[token_id] - row.max() - np.log(np.exp(row - row.max()).sum()))


def scores_of(events: list[TokenEvent]) -> list[float]:
    (scored,) = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert events[0].prompt_logprobs is not None and events[0].token_id is None, "before the first token"
    return [item.logprob for item in scored]


@pytest.mark.parametrize("num_prompt", [1, 2, 15, 16, 17, 32, 33, 50])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("is_ragged", [True, False])
def test_every_token_is_scored_however_the_prompt_is_cut(num_prompt: int, max_tokens: int, *, is_ragged: bool) -> None:
    session = FakeSession(num_slots=4, capacity=CAPACITY, vocab_size=VOCAB, is_ragged=is_ragged)
    engine = Engine(session, prefill_chunk=16)
    prompt = [(7 * i + 3) % VOCAB for i in range(num_prompt)]
    params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=2)
    neighbours = [
        add(engine, f"n{i}", [i + 1] * (5 * i + 1), SamplingParams(max_tokens=4, temperature=0)) for i in range(3)
    ]
    recorder = add(engine, "scored", prompt, params)
    while engine.has_work:
        engine.step()
    assert scores_of(recorder.events) == pytest.approx(
        [expected_logprob(prompt[:i], prompt[i], VOCAB) for i in range(1, num_prompt)], abs=1e-5
    )
    assert recorder.reason is FinishReason.LENGTH and len(recorder.token_ids) == max_tokens
    assert all(len(neighbour.token_ids) == 4 for neighbour in neighbours)
    plain = add(engine, "plain", prompt, SamplingParams(max_tokens=max(1, max_tokens), temperature=0))
    while engine.has_work:
        engine.step()
    assert plain.token_ids[:max_tokens] == recorder.token_ids, "what follows is what follows without scores"


def test_no_run_asks_for_more_rows_of_logits_than_a_chunk_has_tokens() -> None:
    session = FakeSession(num_slots=4, capacity=CAPACITY, vocab_size=VOCAB)
    engine = Engine(session, prefill_chunk=16)
    for number in range(4):
        add(engine, str(number), [1] * 50, SamplingParams(max_tokens=0, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    assert max(len(batch.logits_idx) for batch in session.batches) <= 16


def test_nothing_to_generate_needs_something_to_score() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        SamplingParams(max_tokens=0, prompt_logprobs=21)


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


def test_the_official_client_whole_and_streamed() -> None:
    with (
        running_server("--num-slots", "4") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        whole = client.completions.create(model=NAME, prompt="once", echo=True, logprobs=1, max_tokens=0)
        stream = client.completions.create(
            model=NAME, prompt="once", echo=True, logprobs=1, max_tokens=2, temperature=0, stream=True
        )
        chunks = [chunk.choices[0] for chunk in stream]
        assert whole.choices[0].logprobs is not None and chunks[0].logprobs is not None
        assert (
            chunks[0].text == "once" and chunks[0].logprobs.token_logprobs == whole.choices[0].logprobs.token_logprobs
        )
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=NAME, prompt="once", max_tokens=0)
        assert refused.value.param == "max_tokens"


@pytest.mark.real
@pytest.mark.oracle
def test_scores_equal_those_of_transformers(smollm2: Artifact, oracle: Any) -> None:
    """Twenty short texts together and one of 300 tokens, which is cut into chunks."""
    model = open_text_model(smollm2.path, EngineSettings(max_batch=8, max_len=512))
    model.start()
    try:
        prompts = [model.encode(text) for text in calibration_data.verification_prompts()]
        prompts.append(model.encode(calibration_data.verification_text())[:300])
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        generations = [model.generate(prompt, params) for prompt in prompts]
        scored = [scores_of(list(generation)) for generation in generations]
    finally:
        model.close()
    assert len(prompts) == 21
    for prompt, scores in zip(prompts, scored, strict=True):
        logits = oracle(prompt).astype(np.float64)
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        expected = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
        assert np.abs(np.array(scores) - expected).max() <= TOLERANCE
        assert math.fsum(scores) < 0
