"""The sampler: filters against a naive reference, chi-square of what is drawn, penalties, logprobs."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.core import SamplingParams
from runtime.engine.sampling.filters import filtered
from runtime.engine.sampling.logits import BadLogitsError
from runtime.engine.sampling.sampler import make_sampler, num_top
from runtime.engine.sampling.vocabulary import Vocabulary
from runtime.session.session import TopRow


def naive_weights(logits: NDArray[np.float32], params: SamplingParams) -> dict[int, float]:
    """Top-k, top-p, min-p and typical-p by sorting everything, in fp64, one token at a time."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if params.top_k:
        order = order[: params.top_k]
    weights = {i: math.exp((float(logits[i]) - float(logits[order[0]])) / params.temperature) for i in order}
    total, reached, nucleus = sum(weights.values()), 0.0, []
    for i in order:
        if reached >= params.top_p * total and params.top_p < 1:
            break
        nucleus.append(i)
        reached += weights[i]
    kept = {i: weights[i] for i in nucleus if weights[i] >= params.min_p * weights[order[0]]}
    return naive_typical(kept, params.typical_p) if params.typical_p < 1 else kept


def naive_typical(weights: dict[int, float], typical_p: float) -> dict[int, float]:
    total, reached, typical = sum(weights.values()), 0.0, {}
    surprisal = {i: math.log(total / w) for i, w in weights.items()}
    entropy = sum(w / total * surprisal[i] for i, w in weights.items())
    for i in sorted(weights, key=lambda i: (abs(surprisal[i] - entropy), i)):
        if reached >= typical_p * total:
            break
        typical[i] = weights[i]
        reached += weights[i]
    return typical


@settings(max_examples=300, deadline=None)
@given(
    # Steps of 1/4: ties are common, and sums in fp32 and fp64 agree on which side of a threshold they fall.
    quarters=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([1.0, 0.999, 0.917, 0.513, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0523, 0.31, 1.0]),
)
def test_filters_keep_what_a_naive_sampler_keeps(
    quarters: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = (np.array(quarters) / 4).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probs = filtered(logits, params)
    kept = range(len(logits)) if ids is None else ids.tolist()
    expected = naive_weights(logits, params)
    if _is_on_an_edge(logits, params):
        return
    assert set(kept) == set(expected)
    assert dict(zip(kept, probs.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def _is_on_an_edge(logits: NDArray[np.float32], params: SamplingParams) -> bool:
    """Whether fp32 rounding alone can move the edge of the nucleus or of min-p, as between exact ties."""
    unfiltered = SamplingParams(temperature=params.temperature, top_k=params.top_k)
    weights = sorted(naive_weights(logits, unfiltered).values())
    cumulative = np.cumsum(weights[::-1]) / sum(weights)
    is_near_top_p = params.top_p < 1 and bool((abs(cumulative - params.top_p) < 1e-5).any())
    return is_near_top_p or any(abs(w - params.min_p) < 1e-5 for w in weights[:-1])


@settings(max_examples=200, deadline=None)
@given(
    # Multiples of 1/7 of different sizes: no two tokens are equally far from the entropy, but for equal ones.
    sevenths=st.lists(st.integers(0, 90), min_size=1, max_size=60, unique=True),
    top_k=st.sampled_from([0, 5]),
    typical_p=st.sampled_from([0.999, 0.917, 0.513, 0.2, 1e-6]),
)
def test_typical_tokens_are_those_of_a_naive_sampler(sevenths: list[int], top_k: int, typical_p: float) -> None:
    logits = (np.array(sevenths) / 7 + np.array(sevenths) ** 2 / 1009).astype(np.float32)
    params = SamplingParams(typical_p=typical_p, top_k=top_k, min_p=0.001)
    ids, weights = filtered(logits, params)
    kept = range(len(logits)) if ids is None else ids.tolist()
    expected = naive_weights(logits, params)
    reached = np.cumsum(list(expected.values())) / sum(naive_weights(logits, replace(params, typical_p=1.0)).values())
    if (abs(reached - typical_p) < 1e-5).any():
        return  # fp32 rounding decides whether one token more is kept
    assert dict(zip(kept, weights.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_typical_leaves_out_a_token_that_is_too_likely() -> None:
    """Entropy 1.83: the one of 0.4 (surprisal 0.92) is further from it than those of 0.1 (2.3)."""
    logits = np.log(np.array([0.4, *[0.1] * 6], np.float32))
    ids, _ = filtered(logits, SamplingParams(typical_p=0.35))
    assert ids is not None and ids.tolist() == [1, 2, 3, 4]


def test_typical_looks_further_from_the_entropy_where_nothing_is_near_it() -> None:
    """One token has all but 0.001 of the probability, the rest is spread thinly: entropy 0.014, all others beyond 9."""
    logits = np.log(np.array([0.999, *[0.001 / 50] * 50], np.float32))
    ids, _ = filtered(logits, SamplingParams(typical_p=0.9995))
    assert ids is not None and ids.tolist() == list(range(26))


def test_top_p_0_is_the_likeliest_token_and_top_k_minus_1_is_off() -> None:
    logits = np.array([0, 2, 1.9, 2], np.float32)
    sampler = make_sampler(SamplingParams(top_p=0, temperature=2, seed=1), [])
    assert {sampler.sample(logits).token_id for _ in range(50)} == {1}
    few, every = (make_sampler(SamplingParams(seed=3, top_k=top_k), []) for top_k in (-1, 0))
    assert [few.sample(logits).token_id for _ in range(50)] == [every.sample(logits).token_id for _ in range(50)]
    assert num_top(SamplingParams(top_k=-1)) is None and num_top(SamplingParams(top_p=0)) == 1


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"temperature": 0, "logprobs": 1}]
)
def test_no_end_is_chosen_among_the_first_tokens(params: dict[str, Any]) -> None:
    logits = np.array([9, 0, 8, 1], np.float32)
    sampler = make_sampler(SamplingParams(min_tokens=3, **params), [], {0, 2})
    chosen = [sampler.sample(logits).token_id for _ in range(12)]
    assert {0, 2}.isdisjoint(chosen[:3]) and set(chosen[3:]) <= {0, 2}


def test_where_a_grammar_leaves_nothing_but_the_end_it_is_chosen() -> None:
    logits = np.array([5, 0, 1], np.float32)
    sampler = make_sampler(SamplingParams(min_tokens=9, temperature=0), [], {2})
    either, end = np.array([False, True, True]), np.array([False, False, True])
    assert [sampler.sample(logits, allowed).token_id for allowed in (either, end, either)] == [1, 2, 1]
    assert either.tolist() == [False, True, True], "the mask is the guide's"


CHI_SQUARE_999 = {2: 13.82, 4: 18.47, 5: 20.52, 7: 24.32}
"""0.999 quantiles by degrees of freedom: a right sampler fails for one seed in a thousand; ours is fixed."""


@pytest.mark.parametrize(
    ("params", "degrees"),
    [
        (SamplingParams(seed=7), 7),
        (SamplingParams(seed=7, temperature=0.6), 7),
        (SamplingParams(seed=7, top_k=3), 2),
        (SamplingParams(seed=7, top_p=0.95), 5),
        (SamplingParams(seed=7, top_p=0.6), 2),
        (SamplingParams(seed=7, min_p=0.31), 4),
        (SamplingParams(seed=7, typical_p=0.6), 4),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(params: SamplingParams, degrees: int) -> None:
    """20,000 draws: a sampler that moved 0.015 of probability from the first token to the second would be
    found with a power of 0.95 or more (noncentral chi-square with noncentrality 37.5)."""
    logits = np.log(np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.09, 0.03, 0.01], np.float32))
    weights = naive_weights(logits, params)
    sampler, num_draws = make_sampler(params, []), 20_000
    counts = np.bincount([sampler.sample(logits).token_id for _ in range(num_draws)], minlength=len(logits))
    assert all(counts[i] == 0 for i in range(len(logits)) if i not in weights)
    assert len(weights) - 1 == degrees
    total = sum(weights.values())
    chi_square = sum((counts[i] - num_draws * w / total) ** 2 / (num_draws * w / total) for i, w in weights.items())
    assert chi_square < CHI_SQUARE_999[degrees]


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = make_sampler(SamplingParams(seed=seed), [])
        return [sampler.sample(logits).token_id for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(-2) == draws(-2)
    assert draws(None) != draws(None)
    assert draws(-1) != draws(-1)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 2, 2, 1], np.float32)
    assert make_sampler(SamplingParams(temperature=0), []).sample(logits).token_id == 1
    assert make_sampler(SamplingParams(temperature=0, logprobs=0), []).sample(logits).token_id == 1


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([4.0, -1.0, 3.9, 3.0], np.float32)
    untouched = logits.copy()
    params = SamplingParams(
        temperature=0, repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25, logprobs=0
    )
    sampler = make_sampler(params, [0, 1])
    # 0 halves to 2, 1 doubles to -2: prompt tokens. 2 wins, then falls to 3.9/2 - 0.5 - 0.25 = 1.2.
    # 3 wins and falls to 0.75. 0 wins with 2.0 and falls to 1.25; 0 again, 1.0; then 2 with 1.2.
    assert [sampler.sample(logits).token_id for _ in range(5)] == [2, 3, 0, 0, 2]
    assert (logits == untouched).all()


def test_presence_and_frequency_leave_the_prompt_alone() -> None:
    logits = np.array([1.0, 0.9], np.float32)
    sampler = make_sampler(SamplingParams(temperature=0, presence_penalty=2), [0, 0])
    assert [sampler.sample(logits).token_id for _ in range(3)] == [0, 1, 0]


def test_penalties_outgrow_their_first_array() -> None:
    logits = (-np.arange(200) / 100).astype(np.float32)
    sampler = make_sampler(SamplingParams(temperature=0, presence_penalty=2), [])
    assert [sampler.sample(logits).token_id for _ in range(200)] == list(range(200))


def test_bias_forces_and_forbids() -> None:
    logits = np.zeros(10, np.float32)
    only = make_sampler(SamplingParams(logit_bias={4: 100}, seed=0), [])
    assert {only.sample(logits).token_id for _ in range(50)} == {4}
    never = make_sampler(SamplingParams(logit_bias={4: -100}, seed=0), [])
    assert 4 not in {never.sample(logits).token_id for _ in range(300)}


def test_logprobs_are_the_models_before_penalties_and_temperature() -> None:
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    log_softmax = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(logprobs=5, temperature=0.2, presence_penalty=2, logit_bias={7: 100}, seed=0)
    choice = make_sampler(params, []).sample(logits)
    assert choice.token_id == 7
    assert choice.logprob == pytest.approx(log_softmax[7], abs=1e-5)
    order = np.argsort(-logits)[:5]
    assert [t.token_id for t in choice.top_logprobs] == order.tolist()
    assert [t.logprob for t in choice.top_logprobs] == pytest.approx(log_softmax[order], abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.5),
        SamplingParams(typical_p=0.5),
        SamplingParams(temperature=0, logprobs=1),
        SamplingParams(temperature=0, presence_penalty=1),
    ],
)
def test_logits_that_are_not_finite_are_refused(bad: float, params: SamplingParams) -> None:
    logits = np.array([0, 1, bad, 3], np.float32)
    with pytest.raises(BadLogitsError, match=r"nan|inf"):
        make_sampler(params, []).sample(logits)


def test_extreme_values_neither_warn_nor_fail() -> None:
    logits = np.array([3e38, -3e38, 0, -np.inf], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for params in (
            SamplingParams(temperature=1e-300, seed=0),
            SamplingParams(temperature=0, repetition_penalty=0.01, logprobs=2),
            SamplingParams(top_k=4, top_p=1e-300, min_p=1, seed=0),
        ):
            assert make_sampler(params, []).sample(logits).token_id == 0


def top_of(row: NDArray[np.float32], k: int) -> TopRow:
    """The k most likely tokens, the lower id first among equals."""
    ids = np.argsort(-row, kind="stable")[:k]
    return TopRow(row[ids], ids, float(np.log(np.exp(row.astype(np.float64)).sum())))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    greedy=st.booleans(),
    top_k=st.integers(1, 40),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 0.7]),
    logprobs=st.sampled_from([None, 0, 5]),
)
def test_the_likeliest_tokens_alone_give_the_choices_of_the_whole_row(
    seed: int, greedy: bool, top_k: int, top_p: float, min_p: float, typical_p: float, logprobs: int | None
) -> None:
    params = SamplingParams(
        temperature=0.0 if greedy else 0.8,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        logprobs=logprobs,
        seed=7,
    )
    needed = num_top(params)
    assert needed is not None
    whole, few = make_sampler(params, [1]), make_sampler(params, [1])
    rng = np.random.default_rng(seed)
    for step in range(4):
        row = (rng.integers(-20, 20, 50) / 4).astype(np.float32)  # ties are common
        # A request's steps need not all be of one kind: the random numbers go on.
        other = few.sample(row) if step == 2 else few.sample_top(top_of(row, needed))
        expected = whole.sample(row)
        assert other.token_id == expected.token_id
        assert other.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [each.token_id for each in other.top_logprobs] == [each.token_id for each in expected.top_logprobs]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
        SamplingParams(temperature=0.0, logit_bias={3: 5.0}),
    ],
)
def test_samplers_that_depend_on_the_whole_row_ask_for_it(params: SamplingParams) -> None:
    assert num_top(params) is None


def test_a_broken_row_is_noticed_by_its_sum() -> None:
    top = TopRow(np.array([2.0, 1.0], np.float32), np.array([5, 6]), math.nan)
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=2)):
        with pytest.raises(BadLogitsError):
            make_sampler(params, [1]).sample_top(top)


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 9}, {"typical_p": 0.8}, {"top_p": 0.1, "min_p": 0.1}],
    ids=str,
)
def test_a_mask_leaves_what_a_row_without_the_others_leaves(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    for share in (0.002, 0.3, 1.0):
        logits = rng.standard_normal(500, np.float32) * 4
        allowed = rng.random(500) <= share
        allowed[7] = True
        masked = np.where(allowed, logits, np.float32(-np.inf))
        for params in (SamplingParams(temperature=0.8, seed=1, **settings), SamplingParams(temperature=0)):
            one, other = make_sampler(params, []), make_sampler(params, [])
            for _ in range(30):
                token_id = one.sample(logits, allowed).token_id
                assert allowed[token_id]
                assert token_id == other.sample(masked).token_id


@pytest.mark.parametrize("shift", [-90.0, 0.0, 90.0], ids=str)
def test_a_whole_vocabulary_keeps_what_the_filters_keep(shift: float) -> None:
    """Whatever its size, its ties and the height of its logits."""
    rng = np.random.default_rng(4)
    for size, ties in ((7, 2), (256, 1), (1000, 40), (70_000, 1)):
        logits = np.round(rng.standard_normal(size) * 40).astype(np.float32) / (10 if ties > 1 else 9.7) + shift
        for params in (SamplingParams(top_p=0.9), SamplingParams(min_p=0.05), SamplingParams(top_p=0.99, min_p=0.001)):
            kept = filtered(logits.astype(np.float32), params).ids
            assert kept is not None
            vocabulary = Vocabulary(logits.astype(np.float32), 1.0)
            ids = np.unique(np.concatenate([kept[:50], np.argsort(-logits)[: len(kept) + 20], [0, size - 1]]))
            differ = [i for i in ids.tolist() if vocabulary.keeps(i, params) != (i in set(kept.tolist()))]
            assert len(differ) <= 1, "rounding may decide the last one"
