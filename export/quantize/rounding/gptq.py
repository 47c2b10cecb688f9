"""GPTQ (arXiv:2210.17323): round a weight matrix column by column, and correct each error in the columns still to come.

The Gram matrix is that of the quantized model's input. With the exact input as well, the target also corrects errors of
earlier layers (GPTAQ, arXiv:2504.02692). The caller's `Grid` says which values a weight can take: a scale per row for
int8, a scale and a zero point per block for int4. Knows nothing about packing or graphs.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean: GPTQ's own value. Without it, weights of
inputs that are rare in the calibration text would be changed too much in favour of frequent ones."""

MAX_GPTQ_INPUTS = 8192
"""Layers with more inputs are rounded to nearest: their Gram matrices would take gigabytes."""

# Columns rounded before the rest of the matrix is updated: GPTQ's lazy batch.
_COLUMNS_AT_ONCE = 64

_INVERTED_AT_ONCE = 128


class Grid(NamedTuple):
    """The values that weights can take: `code * scale`, with an integer code in `lowest .. highest`.

    All arrays are float32 `[groups, N]`. In each row, every `group_size` columns share one scale.
    """

    scales: Array
    lowest: Array
    highest: Array
    group_size: int

    def codes(self, weight: Array) -> NDArray[np.int8]:
        """Round float32 `[N, K]` to the nearest codes."""
        n, k = weight.shape
        blocks = weight.T.reshape(k // self.group_size, self.group_size, n)
        codes = np.clip(np.rint(blocks / self.scales[:, None]), self.lowest[:, None], self.highest[:, None])
        return np.ascontiguousarray(codes.astype(np.int8).reshape(k, n).T)

    def values(self, codes: NDArray[np.int8]) -> Array:
        """Dequantize codes `[N, K]` to float32."""
        n, k = codes.shape
        blocks = codes.T.reshape(k // self.group_size, self.group_size, n)
        return np.asarray((blocks * self.scales[:, None]).reshape(k, n).T, np.float32)


class GramMatrices:
    """Sums over tokens that GPTQ needs: the rounded input's Gram matrix, and its product with the exact input.

    float32 `[K, K]` each; memory does not grow with the tokens. Without the product with the exact input (`crossed` is
    None), GPTQ corrects the errors of this layer's weights, and not those of its input.
    """

    def __init__(self, num_channels: int, *, aims_at_exact: bool) -> None:
        self.rounded = np.zeros((num_channels, num_channels), np.float32)
        self.crossed = np.zeros((num_channels, num_channels), np.float32) if aims_at_exact else None

    def update(self, exact: Array, rounded: Array, token_weight: Array) -> None:
        """Add tokens `[n, K]`; token_weight `[n]` weights each token's squared error."""
        root = np.sqrt(token_weight)[:, None]
        halfway = rounded * root
        self.rounded += halfway.T @ halfway  # BLAS computes half of a product of an array with itself
        if self.crossed is not None:
            self.crossed += exact.T @ (halfway * root)


class GptqFactors(NamedTuple):
    """What GPTQ needs to round every matrix that reads one input.

    correction: float32 `[K, K]`; a weight times this is the compensated target: the real-valued weight whose product
        with the rounded input is nearest to the exact product (least squares). None: the weight itself is the target
    factor: float32 `[K, K]`, upper triangular, in the columns' order: the Gram matrix's inverse is `factor' factor`
    order: int64 `[K]`, the order in which columns are rounded
    """

    correction: Array | None
    factor: Array
    order: NDArray[np.int64]

    def target(self, weight: Array) -> Array:
        """The compensated target of a weight, float32 `[N, K]`."""
        return weight if self.correction is None else np.asarray(weight @ self.correction)


def gptq_factors(gram: GramMatrices, *, shrinkage: float = 0.0, act_order: bool = False) -> GptqFactors | None:
    """Factorize an input's Gram matrix; None if the input was always 0.

    shrinkage: share by which off-diagonal elements are reduced, because some correlations are chance
    act_order: round the columns with the largest inputs first, while many columns are left to correct their errors; the
        grid is fixed before, so no group index is needed
    """
    energy = np.diagonal(gram.rounded).astype(np.float64)
    if energy.mean() <= 0:
        return None
    order = np.argsort(-energy, kind="stable") if act_order else np.arange(len(energy))

    def prepared(sums: Array) -> NDArray[np.float64]:
        """Damp and shrink, in the columns' order. One matrix at a time: each is an export's largest array."""
        matrix = sums[np.ix_(order, order)].astype(np.float64)
        kept = np.diagonal(matrix).copy()
        matrix *= 1 - shrinkage
        matrix[np.diag_indices(len(matrix))] = kept + DAMPING * energy.mean()
        return matrix

    # gram = U U' with U upper triangular, so the inverse is F' F with F = U^-1. Both steps use F.
    upper = np.linalg.cholesky(prepared(gram.rounded)[::-1, ::-1])[::-1, ::-1]
    factor = _inverse_of_upper(upper)
    correction = None
    if gram.crossed is not None:
        correction = np.empty(factor.shape, np.float32)
        correction[np.ix_(order, order)] = prepared(gram.crossed) @ factor.T @ factor
    return GptqFactors(correction, factor.astype(np.float32), order)


def _inverse_of_upper(upper: NDArray[Any]) -> NDArray[np.float64]:
    """Invert by halves: nearly all of the work is matrix products, a seventh of the time of a general inverse."""
    if len(upper) <= _INVERTED_AT_ONCE:
        return np.asarray(np.linalg.inv(upper))
    half = len(upper) // 2
    inverse = np.zeros_like(upper)
    first = inverse[:half, :half] = _inverse_of_upper(upper[:half, :half])
    last = inverse[half:, half:] = _inverse_of_upper(upper[half:, half:])
    inverse[:half, half:] = -(first @ upper[:half, half:]) @ last
    return inverse


def rounded_codes(target: Array, factors: GptqFactors, grid: Grid) -> NDArray[np.int8]:
    """Round a compensated target, float32 `[N, K]`, column by column; each error is corrected in the next columns."""
    order, factor = factors.order, factors.factor
    left = np.ascontiguousarray(target.T[order])  # [K, N], because rows are contiguous
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
