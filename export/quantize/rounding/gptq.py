"""GPTQ (arXiv:2210.17323): round a weight matrix column by column, and correct each error in the columns still to come.

It is computed as LDLQ (arXiv:2307.13304), which gives the same codes. With a Gram matrix V D V', column j becomes the
code nearest to its target plus the errors of the columns before it times V[:j, j]. So one triangular factor is enough,
and no large matrix is inverted. Large steps are products in float32: the damping keeps the factor well conditioned.

The Gram matrix is that of the quantized model's input. With the exact input as well, the target also corrects errors of
earlier layers (GPTAQ, arXiv:2504.02692). The caller's `Grid` says which values a weight can take: a scale per row for
int8, a scale and a zero point per block for int4. Knows nothing about packing or graphs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.quantize.statistics.parallel import in_order, num_workers, slices_of

Array = NDArray[np.float32]

DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean: GPTQ's own value. Without it, weights of
inputs that are rare in the calibration text would be changed too much in favour of frequent ones."""

MAX_GPTQ_INPUTS = 8192
"""Layers with more inputs are rounded to nearest: their Gram matrices would take gigabytes."""

# Columns whose target is computed at once, and those that are corrected one by one, each with its predecessors.
_COLUMNS_AT_ONCE, _ONE_BY_ONE = 128, 16

# Rows that one worker rounds at once. The columns of a block should fit the processor's cache: 128 columns are 1 MB.
_ROWS_AT_ONCE = 2048

# Tokens whose inputs are rounded at once.
_TOKENS_AT_ONCE = 128

# Columns of the factor that are computed at once. Only squares of this size are factorized in double precision.
_FACTORED_AT_ONCE = 256


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

    def of_rows(self, some: slice) -> "Grid":
        """The grid of some rows of the weight."""
        return Grid(self.scales[:, some], self.lowest[:, some], self.highest[:, some], self.group_size)


class GramMatrix:
    """The weighted sum of x x' over tokens, float32 `[K, K]`, of the inputs that the rounded layer will get."""

    def __init__(self, num_channels: int) -> None:
        self.sums = np.zeros((num_channels, num_channels), np.float32)
        self._is_empty = True

    def update(self, inputs: Array, token_weight: Array, seen: Callable[[Array], Array] = np.asarray) -> None:
        """Add tokens `[n, K]`. token_weight `[n]` weights each token's squared error; seen: rounds the inputs."""
        weighted, root = np.empty_like(inputs), np.sqrt(token_weight)[:, None]

        def fill(some: slice) -> None:
            np.multiply(seen(inputs[some]), root[some], out=weighted[some])

        for _ in in_order(fill, slices_of(len(inputs), _TOKENS_AT_ONCE)):
            pass
        sums = weighted.T @ weighted  # BLAS computes half of a product of an array with itself
        self.sums = sums if self._is_empty else self.sums + sums
        self._is_empty = False


def drift(weight: Array, exact: Array, seen: Array, token_weight: Array, *, shrinkage: float) -> Array:
    """What the output lost before this layer, against the input that it gets: weight E' S, float32 `[N, K]`.

    exact, seen: the layer's inputs `[n, K]` in the float model and in the rounded one; E is their difference, S is
        `seen` with its tokens weighted
    shrinkage: share by which products of two different channels are reduced, as in `factorized`
    """
    difference, weighted = exact - seen, seen * token_weight[:, None]
    (n, k), num_tokens = weight.shape, len(seen)
    if 2 * n * num_tokens < k * (num_tokens + n):
        found = (weight @ difference.T) @ weighted
    else:
        found = weight @ (difference.T @ weighted)
    found *= np.float32(1 - shrinkage)
    found += weight * (np.float32(shrinkage) * np.einsum("nk,nk->k", difference, weighted))
    return np.asarray(found, np.float32)


class Factor(NamedTuple):
    """A damped Gram matrix V D V', its rows and columns in the order in which columns are rounded.

    unit: V, float32 `[K, K]`, upper triangular with a diagonal of 1; what is below the diagonal is not used
    pivots: D, float32 `[K]`; inverses: of the blocks on V's diagonal; order: int64 `[K]`
    """

    unit: Array
    pivots: Array
    inverses: list[Array]
    order: NDArray[np.int64]

    def solved(self, rows: Array) -> Array:
        """Rows `[N, K]` times the inverse of the Gram matrix, in the weight's own order of columns."""
        x = rows[:, self.order]
        blocks = list(zip(_blocks(len(self.unit)), self.inverses, strict=True))
        for (start, stop), inverse in reversed(blocks):  # x V' = rows
            x[:, start:stop] -= x[:, stop:] @ self.unit[start:stop, stop:].T
            x[:, start:stop] = x[:, start:stop] @ inverse.T
        x /= self.pivots
        for (start, stop), inverse in blocks:  # y V = x
            x[:, start:stop] -= x[:, :start] @ self.unit[:start, start:stop]
            x[:, start:stop] = x[:, start:stop] @ inverse
        out = np.empty_like(x)
        out[:, self.order] = x
        return out


def factorized(gram: GramMatrix, *, shrinkage: float = 0.0, act_order: bool = False) -> Factor | None:
    """Damp and factorize an input's Gram matrix, which is overwritten; None if the input was always 0.

    shrinkage: share by which off-diagonal elements are reduced, because some correlations are chance
    act_order: round the columns with the largest inputs first, while many columns are left to correct their errors; the
        grid is fixed before, so no group index is needed
    """
    energy = np.diagonal(gram.sums).astype(np.float64)
    if energy.mean() <= 0:
        return None
    order = np.argsort(-energy, kind="stable") if act_order else np.arange(len(energy))
    unit = gram.sums[np.ix_(order, order)] if act_order else gram.sums
    unit *= np.float32(1 - shrinkage)
    unit[np.diag_indices(len(unit))] = energy[order] + DAMPING * energy.mean()
    pivots = np.empty(len(unit), np.float32)
    inverses: list[Array] = []
    for start, stop in reversed(list(_blocks(len(unit)))):
        unit[:stop, start:stop] -= unit[:stop, stop:] @ (unit[start:stop, stop:] * pivots[stop:]).T
        square = unit[start:stop, start:stop].astype(np.float64)
        upper = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        roots = np.diagonal(upper)
        inverse = np.linalg.inv(upper / roots)
        unit[start:stop, start:stop] = upper / roots
        unit[:start, start:stop] = unit[:start, start:stop] @ (inverse.T / np.square(roots)).astype(np.float32)
        pivots[start:stop] = np.square(roots)
        inverses.insert(0, inverse.astype(np.float32))
    return Factor(unit, pivots, inverses, order)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, size, _FACTORED_AT_ONCE), size])


def rounded_codes(target: Array, factor: Factor, grid: Grid) -> NDArray[np.int8]:
    """Round a target, float32 `[N, K]`, column by column; each error is corrected in the next columns."""
    codes = np.empty(target.shape, np.int8)
    num_parts = max(num_workers(), -(-len(target) // _ROWS_AT_ONCE))
    parts = slices_of(len(target), -(-len(target) // num_parts))
    for part, rounded in zip(parts, in_order(partial(_rounded_rows, target, factor, grid), parts), strict=True):
        codes[part] = rounded
    return codes


def _rounded_rows(target: Array, factor: Factor, grid: Grid, some: slice) -> NDArray[np.int8]:
    """Codes of the rows `some`."""
    gains, order = factor.unit, factor.order
    grid, rows = grid.of_rows(some), target[some]
    num_channels, num_rows = len(order), len(rows)
    errors = np.empty((num_channels, num_rows), np.float32)  # [K, N], because a column is contiguous
    codes = np.empty((num_channels, num_rows), np.int8)
    group_of = order // grid.group_size
    change, code = np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
    for start in range(0, num_channels, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, num_channels)
        errors[start:stop] = rows.T[order[start:stop]]  # the target, until its code is subtracted
        wanted = gains[:start, start:stop].T @ errors[:start]
        wanted += errors[start:stop]
        for first in range(start, stop, _ONE_BY_ONE):
            last = min(first + _ONE_BY_ONE, stop)
            wanted[first - start : last - start] += gains[start:first, first:last].T @ errors[start:first]
            for idx in range(first, last):
                scales, group = grid.scales[group_of[idx]], group_of[idx]
                np.dot(gains[first:idx, idx], errors[first:idx], out=change)
                np.add(wanted[idx - start], change, out=code)
                np.divide(code, scales, out=code)
                np.rint(code, out=code)
                np.clip(code, grid.lowest[group], grid.highest[group], out=code)
                codes[order[idx]] = code
                errors[idx] -= np.multiply(code, scales, out=code)
    return np.ascontiguousarray(codes.T)
