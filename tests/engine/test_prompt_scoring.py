"""Log-probabilities of prompts: right wherever the prompt is cut and whatever else runs, and what they need."""

import pytest

from runtime.core import FinishReason, SamplingParams
from runtime.engine.engine import Engine
from runtime.errors import InvalidRequest
from tests.support.engine_requests import CAPACITY, VOCAB, add, expected_logprob, scores_of
from tests.support.fake_session import FakeSession


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
