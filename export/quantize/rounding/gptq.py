"""Round a weight matrix column after column, so that the columns still to come make up for those already rounded.

GPTQ (arXiv:2210.17323), against what the rounded input computes rather than the exact one (as GPTAQ, arXiv:2504.02692),
so that a part of the errors made before this layer is taken back too. Which values a weight can take is the caller's
`Grid`: a scale a row for int8, a scale and a zero point a block for int4. Knows nothing about packing or graphs.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean: GPTQ's own value. It keeps directions that the
calibration text hardly shows from being bent for the sake of those it shows often."""

MAX_COMPENSATED = 8192
"""Inputs of a layer beyond which its weights are rounded to nearest: the Gram matrices would take gigabytes."""

# Columns rounded before the rest of the matrix is brought up to date: GPTQ's lazy batch.
_COLUMNS_AT_ONCE = 64

_INVERTED_AT_ONCE = 128


class Grid(NamedTuple):
    """What a weight can become: `code * scale` with an integer code in `lowest .. highest`.

    All are float32 `[groups, N]`: the first `group_size` columns of a row share its first scale, and so on.
    """

    scales: Array
    lowest: Array
    highest: Array
    group_size: int

    def codes(self, weight: Array) -> NDArray[np.int8]:
        """float32 `[N, K]` to the nearest codes."""
        n, k = weight.shape
        blocks = weight.T.reshape(k // self.group_size, self.group_size, n)
        codes = np.clip(np.rint(blocks / self.scales[:, None]), self.lowest[:, None], self.highest[:, None])
        return np.ascontiguousarray(codes.astype(np.int8).reshape(k, n).T)

    def values(self, codes: NDArray[np.int8]) -> Array:
        """The float32 `[N, K]` that the codes stand for."""
        n, k = codes.shape
        blocks = codes.T.reshape(k // self.group_size, self.group_size, n)
        return np.asarray((blocks * self.scales[:, None]).reshape(k, n).T, np.float32)


class Moments:
    """Sums over tokens that error compensation needs: Gram matrix of the rounded input, and against the exact one.

    float32 `[K, K]` each; memory does not grow with the tokens. Without the exact input (`crossed` None) only the
    weights' own errors are made up for (GPTQ), not those of the input.
    """

    def __init__(self, num_channels: int, *, aims_at_exact: bool) -> None:
        self.rounded = np.zeros((num_channels, num_channels), np.float32)
        self.crossed = np.zeros((num_channels, num_channels), np.float32) if aims_at_exact else None

    def update(self, exact: Array, rounded: Array, token_weight: Array) -> None:
        """Add rows `[n, K]`; token_weight `[n]` says how much a token's error matters."""
        root = np.sqrt(token_weight)[:, None]
        halfway = rounded * root
        self.rounded += halfway.T @ halfway  # of one array with itself: half the arithmetic
        if self.crossed is not None:
            self.crossed += exact.T @ (halfway * root)


class Problem(NamedTuple):
    """What rounding the matrices of one input has to solve.

    best: float32 `[K, K]`: weights times this do best with the rounded input while they are real (least squares); None
        for the weights as they are
    factor: float32 `[K, K]`, upper, in the columns' order: the inverse of the Gram matrix is `factor' factor`
    order: int64 `[K]`, which column is rounded first, second ...
    """

    best: Array | None
    factor: Array
    order: NDArray[np.int64]

    def target(self, weight: Array) -> Array:
        """What float32 `[N, K]` is to come near to."""
        return weight if self.best is None else np.asarray(weight @ self.best)


def problem_of(
    moments: Moments, *, damping: float = DAMPING, shrinkage: float = 0.0, heaviest_first: bool = False
) -> Problem | None:
    """The least-squares problem of an input; None where it was always 0.

    shrinkage: share by which everything off the diagonal is taken back, against correlations that are chance
    heaviest_first: round the columns with the largest inputs while there are many to make up for them (GPTQ's
        act-order; as the grid is fixed beforehand, no index of groups comes of it)
    """
    energy = np.diagonal(moments.rounded).astype(np.float64)
    if energy.mean() <= 0:
        return None
    order = np.argsort(-energy, kind="stable") if heaviest_first else np.arange(len(energy))

    def prepared(sums: Array) -> NDArray[np.float64]:
        """Damped and shrunk, in the columns' order; one at a time, as each is the largest array of a whole export."""
        matrix = sums[np.ix_(order, order)].astype(np.float64)
        kept = np.diagonal(matrix).copy()
        matrix *= 1 - shrinkage
        matrix[np.diag_indices(len(matrix))] = kept + damping * energy.mean()
        return matrix

    # gram = U U', U upper, so its inverse is F' F with F = inverse of U, upper too: one factor serves both steps.
    upper = np.linalg.cholesky(prepared(moments.rounded)[::-1, ::-1])[::-1, ::-1]
    factor = _inverse_of_upper(upper)
    best = None
    if moments.crossed is not None:
        best = np.empty(factor.shape, np.float32)
        best[np.ix_(order, order)] = prepared(moments.crossed) @ factor.T @ factor
    return Problem(best, factor.astype(np.float32), order)


def _inverse_of_upper(upper: NDArray[Any]) -> NDArray[np.float64]:
    """By halves, so that nearly all of it is matrix products: a seventh of the time of an inverse of any matrix."""
    if len(upper) <= _INVERTED_AT_ONCE:
        return np.asarray(np.linalg.inv(upper))
    half = len(upper) // 2
    inverse = np.zeros_like(upper)
    first = inverse[:half, :half] = _inverse_of_upper(upper[:half, :half])
    last = inverse[half:, half:] = _inverse_of_upper(upper[half:, half:])
    inverse[:half, half:] = -(first @ upper[:half, half:]) @ last
    return inverse


def rounded_codes(target: Array, problem: Problem, grid: Grid) -> NDArray[np.int8]:
    """Codes of float32 `[N, K]`, made by `problem.target`: column by column, each error spread over the next."""
    order, factor = problem.order, problem.factor
    left = np.ascontiguousarray(target.T[order])  # [K, N]: a column of the weight is a row here
    codes = np.empty(left.shape, np.int8)
    group_of = order // grid.group_size
    num_channels = len(left)
    for start in range(0, num_channels, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, num_channels)
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for idx in range(start, stop):
            group = group_of[idx]
            scales = grid.scales[group]
            rounded = np.clip(np.rint(left[idx] / scales), grid.lowest[group], grid.highest[group])
            codes[order[idx]] = rounded
            error = (left[idx] - rounded * scales) / factor[idx, idx]
            left[idx + 1 : stop] -= factor[idx, idx + 1 : stop, None] * error
            errors[idx - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T)
