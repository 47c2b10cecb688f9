"""The native draw: the token at which the running sum passes, and whether top-p and min-p keep it, against fp64."""

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.core import SamplingParams
from runtime.engine.sampling.logits import BadLogitsError
from runtime.engine.sampling.native_draw import NativeDraw, native_draw
from runtime.engine.sampling.vocabulary import Vocabulary, draws_from

UNIFORMS = np.linspace(0, 1, 199, endpoint=False)


@pytest.fixture
def draw(library: ctypes.CDLL) -> NativeDraw:
    """The draw of each variant in turn."""
    native_draw.cache_clear()
    found = native_draw()
    assert found is not None
    return found


def weights_of(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return found


def kept_by(weights: NDArray[np.float64], token: int, top_p: float, min_p: float) -> bool | None:
    """Whether the filters keep a token; None so near an edge that float32 decides."""
    higher = weights[weights > weights[token]].sum() + weights[token] * (weights[:token] == weights[token]).sum()
    distance, total = top_p * weights.sum() - higher, weights.sum()
    if (top_p < 1 and abs(distance) < 1e-5 * total) or abs(weights[token] - min_p) < 1e-5:
        return None
    return (top_p == 1 or distance > 0) and bool(weights[token] >= min_p)


@pytest.mark.parametrize("num_logits", [1, 5, 255, 256, 257, 3000, 49_152])
@pytest.mark.parametrize(("temperature", "top_p", "min_p"), [(1, 1, 0), (0.8, 0.95, 0), (0.3, 0.5, 0), (2, 0.9, 0.1)])
def test_it_draws_what_float64_draws(
    draw: NativeDraw, num_logits: int, temperature: float, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(num_logits).normal(scale=3, size=num_logits).astype(np.float32)
    logits[num_logits // 2] = logits[0]  # equal ones: the lower id comes first
    weights = weights_of(logits, temperature)
    cumulative = np.cumsum(weights) / weights.sum()
    dropped = 0
    for uniform in UNIFORMS:
        token = int(np.searchsorted(cumulative, uniform, side="right"))
        if np.abs(cumulative - uniform).min() < 1e-6:
            continue
        expected = kept_by(weights, token, top_p, min_p)
        found = draw(logits, 1 / temperature, top_p, min_p, uniform)
        dropped += found is None
        if expected is not None:
            assert found == (token if expected else None)
    assert dropped > 0 or top_p == 1 or num_logits < 3000, "the filters have something to drop"


def test_what_may_not_be_drawn_is_not(draw: NativeDraw) -> None:
    logits = np.full(700, -np.inf, np.float32)
    logits[[3, 300, 699]] = 1.0, 2.0, 1.5
    assert {draw(logits, 1.0, 1.0, 0.0, uniform) for uniform in UNIFORMS} == {3, 300, 699}
    assert draw(logits, 1.0, 1.0, 0.0, np.nextafter(1.0, 0.0)) == 699
    assert draw(logits, 1e5, 1.0, 0.0, 0.999) == 300, "near a temperature of 0 the likeliest is left"


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 255, 299])
def test_broken_logits_are_an_error(draw: NativeDraw, broken: float, position: int) -> None:
    logits = np.zeros(300, np.float32)
    logits[position] = broken
    with pytest.raises(BadLogitsError):
        draw(logits, 1.0, 0.9, 0.0, 0.5)


def test_both_ways_draw_with_the_same_odds(draw: NativeDraw) -> None:
    """numpy goes through the vocabulary in another order; how often a token comes is the same."""
    logits = np.array([1.0, 2.0, 0.5, 3.0], np.float32)
    params = SamplingParams(temperature=1.0)
    vocabulary, uniforms = Vocabulary(logits, 1.0), np.linspace(0, 1, 4000, endpoint=False)
    ours = np.bincount([draw(logits, 1.0, 1.0, 0.0, uniform) or 0 for uniform in uniforms], minlength=4)
    theirs = np.bincount([vocabulary.draw(uniform) for uniform in uniforms], minlength=4)
    np.testing.assert_allclose(ours, theirs, atol=1)
    allowed = np.array([True, False, True, False])
    assert {draws_from(logits, params, allowed)(uniform) for uniform in UNIFORMS} == {0, 2}
