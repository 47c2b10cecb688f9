"""Speculation: the same tokens with drafts and without, the same distribution, and no drafts where they do not pay."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.core import FinishReason, Request, RequestOptions, SamplingParams
from runtime.engine.engine import Engine
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.draft_state import MAX_DRAFT
from runtime.engine.speculation.prompt_lookup import PromptLookup
from runtime.engine.speculation.run_cost import RunCost
from runtime.engine.speculation.speculator import Speculator
from runtime.errors import InvalidRequest
from tests.support.engine_requests import VOCAB, Recorder, add, alone, greedy, make_request
from tests.support.fake_session import FakeSession, prefix_logits

EVERY_DRAFT = 0.0


def engine_for(session: FakeSession, *, min_gain: float = EVERY_DRAFT) -> Engine:
    return Engine(session, prefill_chunk=64, drafter=Speculator(min_gain=min_gain))


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def request_of(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> tuple[Request, Recorder]:
    request, recorder = make_request(name, prompt, params)
    engine.add(engine.prepare(request))
    return request, recorder


@pytest.mark.parametrize(
    "params",
    [
        greedy(60),
        SamplingParams(max_tokens=60, temperature=0.3, seed=1),
        SamplingParams(max_tokens=60, temperature=0.5, seed=2, top_p=0.9, repetition_penalty=1.1, logprobs=2),
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_a_text_that_repeats_itself_takes_fewer_runs_and_has_the_same_events(params: SamplingParams) -> None:
    session = FakeSession(capacity=160, vocab_size=VOCAB, memory=1)
    engine = engine_for(session)
    request, recorder = request_of(engine, "a", [1, 2, 3], params)
    finish(engine)
    assert recorder.events == alone([1, 2, 3], params, memory=1)
    usage = request.usage
    assert 0 < usage.num_accepted <= usage.num_drafted
    # One token of the prefill; then each run gives one token and those of the draft that it accepted. The last token
    # may be an accepted one, whose end is not counted.
    assert len(session.batches) - 1 + usage.num_accepted in (58, 59)


def test_rows_of_a_batch_take_drafts_of_their_own_length_along() -> None:
    session = FakeSession(num_slots=3, capacity=160, vocab_size=VOCAB, memory=1)
    engine = engine_for(session)
    prompts = ([5] * 4, [7, 8, 9, 10], [3, 4])
    recorders = [add(engine, str(idx), prompt, greedy(30)) for idx, prompt in enumerate(prompts)]
    finish(engine)
    assert [r.events for r in recorders] == [alone(prompt, greedy(30), memory=1) for prompt in prompts]
    lengths = [set(batch.query_len[batch.query_len > 0].tolist()) for batch in session.batches[1:]]
    assert any(len(found) > 1 for found in lengths)
    assert max(map(max, lengths)) == 1 + MAX_DRAFT


def test_a_draft_stops_at_the_slots_end_and_at_max_tokens() -> None:
    for capacity in (24, 25, 60):
        session = FakeSession(num_slots=2, capacity=capacity, vocab_size=VOCAB, memory=1)
        engine = engine_for(session)
        recorder = add(engine, "a", [1, 2, 3], greedy(21))
        finish(engine)
        assert len(recorder.token_ids) == 21  # FakeSession checks that no run leaves its slot


def test_a_session_that_is_not_ragged_never_gets_a_draft() -> None:
    session = FakeSession(capacity=160, vocab_size=VOCAB, memory=1, is_ragged=False)
    engine = engine_for(session)
    request, recorder = request_of(engine, "a", [1, 2, 3], greedy(40))
    finish(engine)
    assert recorder.events == alone([1, 2, 3], greedy(40), memory=1)
    assert request.usage.num_drafted == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
def test_a_draft_is_what_followed_the_last_time(prompt: list[int], answer: list[int]) -> None:
    lookup = PromptLookup(prompt)
    before = None
    for count, token_id in enumerate([*answer, 0]):
        ids = prompt + answer[:count]
        draft = lookup.draft(5)
        places = {size: _last_place(ids, size) for size in (3, 2, 1)}
        assert (lookup.match is None) == (not draft)
        if draft:
            assert lookup.match is not None
            period = len(ids) - lookup.match
            assert draft == [ids[lookup.match + i % period] for i in range(5)]
        if before is None or lookup.match != before + 1:
            assert lookup.match == next((place for place in places.values() if place is not None), None)
        assert 0 < lookup.rate(lookup._match_len) < 1
        before = lookup.match
        lookup.push(token_id)


PREDICTED = [*range(20, 32), 7, *range(32, 40)]


def test_a_prediction_is_copied_from_its_first_token_to_its_last_and_not_beyond() -> None:
    lookup = PromptLookup([1, 2, 3, 20], PREDICTED)
    assert lookup.text_ids == [1, 2, 3, 20]
    for count, token_id in enumerate(PREDICTED):
        assert lookup.draft(4) == PREDICTED[count : count + 4], "rather than what the prompt has"
        lookup.push(token_id)
    assert lookup.match is None and lookup.draft(4) == []
    assert lookup.text_ids == [1, 2, 3, 20, *PREDICTED]


def test_a_text_that_leaves_its_prediction_finds_back() -> None:
    lookup = PromptLookup([1, 2, 24, 2], PREDICTED)
    for token_id in (20, 21, 49, 48, 24):
        lookup.push(token_id)
    assert lookup.draft(3) == [25, 26, 27], "its own words come before the prompt's"
    lookup.push(25)
    assert lookup.draft_behind([26, 27], 2)[0] == [28, 29]


@pytest.mark.parametrize("has_draft_model", [False, True], ids=["copied", "draft model"])
@pytest.mark.parametrize("prediction", ["right", "half right", "wrong", "none"])
def test_a_prediction_saves_runs_where_it_is_right_and_changes_no_token(
    prediction: str, *, has_draft_model: bool
) -> None:
    prompt, params = [1, 2, 3], SamplingParams(max_tokens=40, temperature=0.7, seed=5, logprobs=1)
    expected = alone(prompt, params)
    answer = [event.token_id for event in expected if event.token_id is not None]
    predicted = {
        "right": answer,
        "half right": [*answer[:20], *answer[23:]],
        "wrong": [(token_id + 1) % VOCAB for token_id in answer],
        "none": [],
    }[prediction]
    session = FakeSession(capacity=160, vocab_size=VOCAB)
    engine = drafting_engine(session, memory=1)[0] if has_draft_model else engine_for(session)
    request, recorder = make_request("a", prompt, params)
    request.options = RequestOptions(prediction_ids=predicted)
    engine.add(engine.prepare(request))
    finish(engine)
    assert recorder.events == expected
    if prediction == "right":
        # The prefill gives one token, three runs give 16, 16 and 7.
        assert request.usage.num_accepted == request.usage.num_drafted == 36 and len(session.batches) == 4
    if prediction == "half right":
        assert request.usage.num_accepted >= 30
    if prediction == "wrong" and not has_draft_model:
        assert request.usage.num_drafted > 0


def test_a_prediction_of_tokens_that_are_none_is_refused() -> None:
    request, _ = make_request("a", [1], greedy(4))
    request.options = RequestOptions(prediction_ids=[3, VOCAB])
    with pytest.raises(InvalidRequest, match=f"token id {VOCAB} is not in the vocabulary") as caught:
        engine_for(FakeSession(vocab_size=VOCAB)).prepare(request)
    assert caught.value.param == "prediction"
    Engine(FakeSession(vocab_size=VOCAB)).prepare(request)  # without drafts it is not looked at


def _last_place(ids: list[int], size: int, end: int | None = None) -> int | None:
    """Behind the last earlier occurrence of the last `size` tokens, and before `end`."""
    tail = ids[len(ids) - size :] if len(ids) >= size else None
    found = [place for place in range(size, len(ids) if end is None else end) if ids[place - size : place] == tail]
    return found[-1] if found else None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_a_draft_behind_other_tokens_is_what_followed_the_same_in_the_text(
    prompt: list[int], between: list[int]
) -> None:
    lookup = PromptLookup(prompt)
    draft, match_len = lookup.draft_behind(between, 4)
    straight_on = lookup.draft(len(between) + 4)
    if straight_on and straight_on[: len(between)] == between:
        assert draft == straight_on[len(between) :] and match_len == lookup._match_len + len(between)
        return
    tail = [*prompt[-3:], *between][-3:]
    places = (_last_place([*prompt, *tail[-size:]], size, len(prompt)) for size in (3, 2, 1) if size <= len(tail))
    place = next((place for place in places if place is not None), None)
    assert draft == ([] if place is None else prompt[place : place + 4])
    assert place is None or prompt[place - match_len : place] == tail[-match_len:]


def test_acceptance_rates_follow_what_happens_also_while_nothing_is_drafted() -> None:
    copied = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9] * 3)
    for token_id in [1, 2, 3, 4, 5, 6, 7, 8, 9] * 4:
        copied.push(token_id)
    assert copied.rate(36) > 0.95
    random = PromptLookup([1, 2, 3, 4])
    rng = np.random.default_rng(0)
    rates = []
    for token_id in rng.integers(0, 6, 600).tolist():
        random.push(token_id)
        if random.match is not None:
            rates.append(random.rate(random._match_len))
    assert np.median(rates[-100:]) < 0.3


class Dictation:
    """A `TokenGuide` that lets nothing but these tokens come."""

    def __init__(self, token_ids: list[int], *, says_so: bool) -> None:
        self._left, self._says_so = token_ids, says_so

    @property
    def is_stopped(self) -> bool:
        return not self._left

    def prepare(self, draft_ids: Sequence[int] = ()) -> None:
        assert list(draft_ids) == self._left[: len(draft_ids)], "only what may come is drafted"

    def allowed(self) -> NDArray[np.bool_]:
        return np.isin(np.arange(VOCAB), self._left[0])

    def advance(self, token_id: int) -> None:
        assert token_id == self._left[0]
        self._left = self._left[1:]

    def forced(self) -> list[int]:
        return self._left[:8] if self._says_so else []

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        wanted = [*self._left, *[-1] * len(token_ids)]
        return next((idx for idx, one in enumerate(token_ids) if one != wanted[idx]), len(token_ids))


@pytest.mark.parametrize(
    ("kind", "num_runs", "num_drafted", "num_accepted"),
    [
        # The prefill gives a token, each further run one and its draft: 8 that are forced, or 15 where copying goes on
        # from there. The last token of all is not counted where it was drafted.
        ("forced", 3, 15, 14),
        ("forced, then copied", 2, 15, 15),
        ("copied", 2, 15, 15),
        ("forbidden", 17, 0, 0),
    ],
)
def test_what_a_grammar_forces_is_drafted_and_what_it_forbids_is_not(
    kind: str, num_runs: int, num_drafted: int, num_accepted: int
) -> None:
    text = np.random.default_rng(0).permutation(VOCAB)[:17].tolist()
    prompt = {
        "forced": [text[0], 1],
        "forced, then copied": [*text, 1],
        "copied": [*text, 1],
        "forbidden": [*text[::-1], 1],
    }[kind]

    def dictate(engine: Engine) -> tuple[Request, Recorder]:
        request, recorder = make_request("a", prompt, greedy(40))
        request.guide = Dictation(text, says_so=kind.startswith("forced"))
        engine.add(engine.prepare(request))
        finish(engine)
        return request, recorder

    session = FakeSession(capacity=160, vocab_size=VOCAB, memory=1)
    request, recorder = dictate(engine_for(session))
    assert recorder.token_ids == text
    assert recorder.events == dictate(Engine(FakeSession(capacity=160, vocab_size=VOCAB, memory=1)))[1].events
    assert len(session.batches) == num_runs
    assert (request.usage.num_drafted, request.usage.num_accepted) == (num_drafted, num_accepted)


@pytest.mark.parametrize("min_gain", [EVERY_DRAFT, 1e9], ids=["drafted", "plain"])
def test_a_stop_token_that_a_grammar_forces_too_early_is_a_token_like_any_other(min_gain: float) -> None:
    text = [3, 9, 4, 9, 5, 9, 6, 7]
    request, recorder = make_request("a", [1], replace(greedy(20), min_tokens=4, stop_token_ids=frozenset({9})))
    request.guide = Dictation(text, says_so=True)
    engine = engine_for(FakeSession(capacity=160, vocab_size=VOCAB, memory=1), min_gain=min_gain)
    engine.add(engine.prepare(request))
    finish(engine)
    assert recorder.token_ids == text[:6] and recorder.reason is FinishReason.STOP


@pytest.mark.parametrize("min_gain", [EVERY_DRAFT, 1e9], ids=["drafted", "plain"])
def test_an_answer_ends_where_its_grammar_leaves_only_the_end_of_text(min_gain: float) -> None:
    request, recorder = make_request("a", [1], replace(greedy(20), min_tokens=9), frozenset({7}))
    request.guide = Dictation([3, 4, 7], says_so=True)
    engine = engine_for(FakeSession(capacity=160, vocab_size=VOCAB, memory=1), min_gain=min_gain)
    engine.add(engine.prepare(request))
    finish(engine)
    assert recorder.token_ids == [3, 4, 7] and recorder.reason is FinishReason.STOP


def add_repeating(engine: Engine, num: int) -> list[Recorder]:
    return [add(engine, str(idx), [1, 2, 3, 4, 5, 6, 7, 8] * 4, greedy(40)) for idx in range(num)]


@pytest.mark.parametrize(
    ("seconds_of", "has_drafts"),
    [
        (lambda tokens: 1.0 + 0.001 * tokens, True),  # bound by reading the weights
        (lambda tokens: 0.001 + tokens, False),  # bound by arithmetic: a draft token costs as much as a row
    ],
    ids=["flat", "linear"],
)
def test_drafts_are_taken_along_where_they_pay(seconds_of: Callable[[int], float], has_drafts: bool) -> None:
    session = FakeSession(num_slots=4, capacity=160, vocab_size=VOCAB, memory=1)
    speculator = Speculator()
    engine = Engine(session, prefill_chunk=64, drafter=speculator)
    add_repeating(engine, 4)
    observe = speculator.observe_run

    def observe_made_up(*, num_rows: int, num_drafted: int, seconds: float) -> None:
        observe(num_rows=num_rows, num_drafted=num_drafted, seconds=seconds_of(num_rows + num_drafted))

    speculator.observe_run = observe_made_up  # type: ignore[method-assign]
    finish(engine)
    # 40 tokens each; the text must come round once before there is anything to draft.
    num_runs = sum(batch.past_len.all() for batch in session.batches)
    assert num_runs < 25 if has_drafts else num_runs > 28  # one must be tried to know


def test_seconds_of_a_run_follow_what_is_measured() -> None:
    cost, rng = RunCost(), np.random.default_rng(0)
    assert cost.estimate(4, 0) is None
    cost.observe(4, 3, 9.0)  # what is extra is not known before a run without drafts
    assert cost.estimate(4, 0) is None
    cost.observe(4, 0, 8.0)
    assert cost.estimate(4, 0) == 8.0
    assert cost.estimate(4, 8) == 16.0, "nothing measured yet: a draft token is half a row"

    def measure(num_runs: int, token_s: float, pace: float = 1.0) -> None:
        for _ in range(num_runs):
            num_drafted = int(rng.integers(0, 12))
            cost.observe(4, num_drafted, pace * (8.0 + token_s * num_drafted) * rng.uniform(0.95, 1.05))

    measure(200, token_s=0.25)
    assert cost.estimate(4, 0) == pytest.approx(8, rel=0.1)
    assert cost.estimate(4, 10) == pytest.approx(10.5, rel=0.1)
    assert cost.estimate(4, 2) == pytest.approx(8.5, rel=0.1)
    cost.observe(4, 5, 1000.0)  # interrupted
    assert cost.estimate(4, 5) == pytest.approx(9.25, rel=0.3)
    measure(50, token_s=0.25)
    cost.observe(6, 0, 10.0)
    assert cost.estimate(6, 10) == pytest.approx(12.5, rel=0.15), "a token costs what it does with four rows"
    measure(200, token_s=0.9, pace=1.5)
    assert cost.estimate(4, 0) == pytest.approx(12, rel=0.1)
    assert cost.estimate(4, 10) == pytest.approx(25.5, rel=0.1)


TEMPERATURE = 1.2
NUM_SAMPLES = 6000
Z_1E_4 = 3.719
"""A normal variable passes this with probability 1e-4."""


def test_sampled_tokens_have_the_models_distribution() -> None:
    """Pearson's test at 1e-4 of what follows the first token, each time the verification of a draft of probability 0.2.

    Power: a sampler that takes the draft unasked in 6 % of the cases would fail in more than 99 % of such tests.
    """
    probs = np.stack([_softmax(prefix_logits(np.array([token_id]), VOCAB, 1)) for token_id in range(VOCAB)])
    before = int(probs.max(1).argmax())
    first = int(probs[before].argmax())
    expected = probs[first]
    draft = int(np.abs(expected - 0.2).argmin())
    # After (before, first) came `draft`: that is the draft whenever the first token is the most likely.
    prompt = [before, first, draft, before]
    session = FakeSession(num_slots=40, capacity=64, vocab_size=VOCAB, memory=1)
    counts = np.zeros(VOCAB)
    num_right = 0
    engine = engine_for(session)
    params = SamplingParams(max_tokens=3, temperature=TEMPERATURE)
    rng = np.random.default_rng(1)
    for _ in range(NUM_SAMPLES // 40):
        seeds = rng.integers(0, 2**62, 40).tolist()
        pairs = [request_of(engine, str(seed), prompt, replace(params, seed=seed)) for seed in seeds]
        finish(engine)
        for request, recorder in pairs:
            if recorder.token_ids[0] == first:
                assert request.usage.num_drafted >= 1
                counts[recorder.token_ids[1]] += 1
                num_right += recorder.token_ids[1] == draft
    assert num_right > 0.1 * counts.sum() > 300
    is_cell = expected > 0.02
    limit = _chi2_limit(int(is_cell.sum()))
    assert _pearson(counts, expected, is_cell) < limit
    broken = 0.94 * expected + 0.06 * np.eye(VOCAB)[draft]
    samples = rng.multinomial(int(counts.sum()), broken, 1000)
    assert np.mean([_pearson(sample, expected, is_cell) > limit for sample in samples]) > 0.99


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp((logits - logits.max()).astype(np.float64) / TEMPERATURE)
    return np.asarray(weights / weights.sum())


def _pearson(counts: NDArray[Any], expected: NDArray[np.float64], is_cell: NDArray[np.bool_]) -> float:
    """The statistic over the likelier tokens, and all others together."""
    total = counts.sum()
    seen = np.append(counts[is_cell], counts[~is_cell].sum())
    wanted = total * np.append(expected[is_cell], expected[~is_cell].sum())
    return float(((seen - wanted) ** 2 / wanted).sum())


def _chi2_limit(freedom: int) -> float:
    """What chi-squared passes with probability 1e-4 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + Z_1E_4 * spread**0.5) ** 3)


def test_greedy_sampled_drafted_cached_and_cancelled_requests_share_batches_and_get_what_they_get_alone() -> None:
    session = FakeSession(num_slots=6, capacity=160, vocab_size=VOCAB, memory=1)
    engine = Engine(session, prefill_chunk=24, prefix_cache=10**6, drafter=Speculator(min_gain=EVERY_DRAFT))
    head = [(5 * i) % VOCAB for i in range(90)]
    add(engine, "warm", [*head, 1], greedy(1))
    finish(engine)
    copied = [*range(10, 30)] * 3
    asked = {
        "greedy": ([4, 5], greedy(40)),
        "sampled": ([6, 7, 8], SamplingParams(max_tokens=40, temperature=0.8, seed=3, top_p=0.9, logprobs=1)),
        "drafted": (copied, greedy(50)),
        "drafted and sampled": (copied, SamplingParams(max_tokens=50, temperature=0.4, seed=4, presence_penalty=0.3)),
        "cached": ([*head, 2, 3], greedy(30)),
        "cached, drafted, sampled": ([*head, 9], SamplingParams(max_tokens=40, temperature=0.6, seed=5)),
        "cancelled": ([*head, 40], greedy(60)),
    }
    pairs = {name: request_of(engine, name, prompt, params) for name, (prompt, params) in asked.items()}
    while len(pairs["cancelled"][1].events) < 3:
        engine.step()
    engine.cancel("cancelled")
    finish(engine)
    for name, (_, recorder) in pairs.items():
        expected = alone(*asked[name], memory=1)
        if name == "cancelled":
            assert 1 < len(recorder.events) < 60
            assert recorder.events[:-1] == expected[: len(recorder.events) - 1]
        else:
            assert recorder.events == expected, name
    for name in ("drafted", "drafted and sampled", "cached, drafted, sampled"):
        assert pairs[name][0].usage.num_accepted > 0, name
    for name in ("cached", "cached, drafted, sampled", "cancelled"):
        assert pairs[name][0].usage.num_cached == 64, name
    assert any((batch.query_len > 0).sum() >= 5 and batch.token_ids.shape[1] > 1 for batch in session.batches)


def drafting_engine(session: FakeSession, *, memory: int, min_gain: float = EVERY_DRAFT) -> tuple[Engine, FakeSession]:
    """An engine whose draft model sees so many tokens back."""
    info = session.info
    draft = FakeSession(num_slots=info.num_slots, capacity=info.capacity, vocab_size=VOCAB, memory=memory)
    speculator = Speculator(DraftModel(draft, prefill_chunk=20), min_gain=min_gain)
    return Engine(session, prefill_chunk=64, drafter=speculator), draft


@pytest.mark.parametrize("draft_memory", [1, 2], ids=["always right", "mostly wrong"])
def test_a_draft_model_changes_no_token(draft_memory: int) -> None:
    session = FakeSession(num_slots=4, capacity=160, vocab_size=VOCAB, memory=1)
    engine, draft = drafting_engine(session, memory=draft_memory)
    prompts = ([5, 1], [*range(50), *range(49)], [3, 4], [9] * 30, [8])
    sampled = SamplingParams(max_tokens=40, temperature=0.6, seed=2)
    pairs = [request_of(engine, str(idx), ids, greedy(40) if idx % 2 else sampled) for idx, ids in enumerate(prompts)]
    finish(engine)
    for idx, (_, recorder) in enumerate(pairs):
        assert recorder.events == alone(prompts[idx], greedy(40) if idx % 2 else sampled, memory=1)
    assert all(request.usage.num_drafted > 0 for request, _ in pairs)
    if draft_memory == 1:
        # It drafts the most likely token, which is what greedy requests take.
        greedy_pairs = pairs[1::2]
        assert all(request.usage.num_accepted > 0.9 * request.usage.num_drafted for request, _ in greedy_pairs)
        assert len(session.batches) < 40
    # A prompt of 99 tokens is caught up with in chunks, between steps.
    assert max(batch.query_len.max() for batch in draft.batches) == 20


def test_a_draft_model_that_breaks_is_left_out_and_nobody_is_hurt() -> None:
    session = FakeSession(num_slots=2, capacity=160, vocab_size=VOCAB, memory=1)
    engine, draft = drafting_engine(session, memory=1)
    recorders = [add(engine, str(idx), [idx, 5], greedy(30)) for idx in range(2)]
    for _ in range(3):
        engine.step()
    draft.close()
    finish(engine)
    assert [r.events for r in recorders] == [alone([idx, 5], greedy(30), memory=1) for idx in range(2)]


def test_a_draft_model_that_does_not_pay_is_hardly_asked() -> None:
    session = FakeSession(num_slots=1, capacity=700, vocab_size=VOCAB, memory=None)
    engine, draft = drafting_engine(session, memory=1, min_gain=1.05)
    recorder = add(engine, "a", [1, 2, 3], greedy(600))
    finish(engine)
    assert len(recorder.token_ids) == 600
    assert len(draft.batches) < 200
