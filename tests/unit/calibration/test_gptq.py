"""GPTQ's factor and the drift of inputs: what they are by definition, computed in double precision."""

import numpy as np
import pytest

from export.quantize.rounding.gptq import DAMPING, GramMatrix, Grid, drift, factorized, rounded_codes

NUM_CHANNELS = 600  # more than the factor's blocks have, and not a multiple of theirs


def some_inputs(num_tokens: int = 700, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((NUM_CHANNELS, NUM_CHANNELS)) * rng.uniform(0.05, 1, NUM_CHANNELS)
    return (rng.standard_normal((num_tokens, NUM_CHANNELS)) @ mixing).astype(np.float32)


def damped(x: np.ndarray, token_weight: np.ndarray, shrinkage: float) -> np.ndarray:
    gram = (x * token_weight[:, None]).T.astype(np.float64) @ x
    diagonal = np.diag(np.diag(gram))
    return np.asarray(
        (1 - shrinkage) * (gram - diagonal) + diagonal + DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    )


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_damped_gram_matrix(*, act_order: bool) -> None:
    x, token_weight = some_inputs(), np.random.default_rng(1).uniform(0.5, 2, 700).astype(np.float32)
    gram = GramMatrix(NUM_CHANNELS)
    for some in (slice(0, 300), slice(300, None)):
        gram.update(x[some], token_weight[some])
    expected = damped(x, token_weight, 0.1)
    factor = factorized(gram, shrinkage=0.1, act_order=act_order)
    assert factor is not None
    unit = np.triu(factor.unit.astype(np.float64))
    assert np.array_equal(np.diag(unit), np.ones(NUM_CHANNELS))
    ordered = expected[np.ix_(factor.order, factor.order)]
    assert np.abs(unit * factor.pivots @ unit.T - ordered).max() < 1e-5 * np.abs(expected).max()
    rows = np.random.default_rng(2).standard_normal((5, NUM_CHANNELS)).astype(np.float32)
    solution = np.linalg.solve(expected, rows.T.astype(np.float64)).T
    assert np.abs(factor.solved(rows) - solution).max() < 1e-3 * np.abs(solution).max()
    if act_order:
        assert (np.diff(np.diag(expected)[factor.order]) <= 1e-3 * np.diag(expected).max()).all()


@pytest.mark.parametrize("num_outputs", [3, 5000])
def test_the_drift_is_the_same_in_both_orders_of_products(num_outputs: int) -> None:
    seen, weight = some_inputs(40), np.random.default_rng(3).standard_normal((num_outputs, NUM_CHANNELS))
    exact, token_weight = seen + np.float32(0.1) * some_inputs(40, seed=1), np.linspace(0.5, 2, 40, dtype=np.float32)
    found = drift(weight.astype(np.float32), exact, seen, token_weight, shrinkage=0.2)
    lost = (exact - seen).T.astype(np.float64) @ (seen * token_weight[:, None])
    lost = 0.8 * lost + 0.2 * np.diag(np.diag(lost))
    assert np.abs(found - weight @ lost).max() < 1e-5 * np.abs(weight @ lost).max()


def test_each_code_is_nearest_to_its_target_and_the_errors_before_it() -> None:
    """The definition, column by column, in double precision."""
    gram = GramMatrix(NUM_CHANNELS)
    gram.update(some_inputs(), np.ones(700, np.float32))
    factor = factorized(gram, act_order=True)
    assert factor is not None
    weight = np.random.default_rng(4).standard_normal((9, NUM_CHANNELS)).astype(np.float32)
    scales = (np.abs(weight).reshape(9, -1, 20).max(2).T / 7).astype(np.float32)
    grid = Grid(scales, np.full_like(scales, -8), np.full_like(scales, 7), 20)
    codes = rounded_codes(weight, factor, grid)
    errors = np.zeros((9, NUM_CHANNELS))
    equal = []
    for place, channel in enumerate(factor.order):
        wanted = weight[:, channel] + errors[:, :place] @ factor.unit[:place, place]
        steps = scales[channel // 20]
        equal.append(codes[:, channel] == np.clip(np.rint(wanted / steps), -8, 7))
        errors[:, place] = weight[:, channel] - codes[:, channel] * steps
    assert np.mean(equal) > 0.999  # a float32 sum may fall on the other side of a half
