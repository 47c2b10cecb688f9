"""Weights to int8, one scale an output channel, and activations to int8 with one scale: the arithmetic, in numpy.

    weight ~ values * scale[:, None]   int8 -127 .. 127
    x      ~ rint(x / scale) * scale   -128 .. 127: uint8 with zero point 128 on x86, int8 with 0 on TensorRT

`rounded_to_nearest` takes each weight alone; `error_compensated` lets the columns still to be rounded make up for
those that were (GPTQ, arXiv:2210.17323), against what the rounded activations compute rather than the exact ones
(as GPTAQ, arXiv:2504.02692), so that a part of the activations' own error is taken back too.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# Added to the diagonal of the Gram matrix, as a share of its mean: GPTQ's own value. It keeps directions that the
# calibration text hardly shows from being bent for the sake of those it shows often.
DAMPING = 0.01
# Columns rounded before the rest of the matrix is brought up to date: GPTQ's lazy batch.
_COLUMNS_AT_ONCE = 64
OUTPUTS_AT_ONCE = 8192
"""Outputs rounded at once: each is rounded for itself, and an LM head has too many to hold their float copies."""


class Int8Rows(NamedTuple):
    """int8 `[N, K]` and float32 scales `[N]`."""

    values: NDArray[np.int8]
    scales: Array

    def dequantized(self) -> Array:
        return np.asarray(self.values * self.scales[:, None], np.float32)


def weight_scales(weight: Array) -> Array:
    """One scale a row of `[N, K]`; a row of zeros gets 1, so that it stays zero."""
    highest = np.abs(weight).max(1)
    return np.where(highest > 0, highest / np.float32(127), np.float32(1)).astype(np.float32)


def rounded_to_nearest(weight: Array) -> Int8Rows:
    """Each weight to the nearest multiple of its row's scale."""
    scales = weight_scales(weight)
    return Int8Rows(np.rint(weight / scales[:, None]).astype(np.int8), scales)


def rounded_activations(x: Array, scale: float, fine_scale: float | None = None) -> Array:
    """What the int8 product sees of x; with a fine scale, a second int8 pass takes up what the first left."""
    coarse = np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
    if fine_scale is None:
        return np.asarray(coarse)
    fine = np.clip(np.rint((x - coarse) / np.float32(fine_scale)), -128, 127) * np.float32(fine_scale)
    return np.asarray(coarse + fine)


class Moments:
    """Sums over tokens that error compensation needs: Gram matrix of the rounded input, and against the exact one.

    float32 `[K, K]` each; memory does not grow with the tokens.
    """

    def __init__(self, num_channels: int) -> None:
        self.rounded = np.zeros((num_channels, num_channels), np.float32)
        self.crossed = np.zeros((num_channels, num_channels), np.float32)

    def update(self, exact: Array, rounded: Array, token_weight: Array) -> None:
        """Add rows `[n, K]`; token_weight `[n]` says how much a token's error matters."""
        weighted = rounded * token_weight[:, None]
        self.rounded += weighted.T @ rounded
        self.crossed += exact.T @ weighted


def error_compensated(weight: Array, moments: Moments) -> Int8Rows:
    """Round float32 `[N, K]` so that its product with the rounded input stays near the exact one."""
    scales = weight_scales(weight)
    gram = moments.rounded.astype(np.float64)
    mean = float(np.trace(gram)) / len(gram)
    if mean <= 0:
        return rounded_to_nearest(weight)
    gram[np.diag_indices(len(gram))] += DAMPING * mean
    # gram = U U', U upper, so its inverse is F' F with F = inverse of U, upper too: one factor serves both steps below.
    factor = np.linalg.inv(np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1])
    crossed = moments.crossed.astype(np.float64)
    crossed[np.diag_indices(len(gram))] += DAMPING * mean
    # Least squares: times this, the weights become the real-valued ones that do best with the rounded input.
    best = (crossed @ factor.T @ factor).astype(np.float32)
    factor = factor.astype(np.float32)
    values = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), OUTPUTS_AT_ONCE):
        some = slice(start, start + OUTPUTS_AT_ONCE)
        values[some] = _sweep(weight[some] @ best, scales[some], factor)
    return Int8Rows(values, scales)


def _sweep(target: Array, scales: Array, factor: Array) -> NDArray[np.int8]:
    """Round column after column, each error spread over the columns to come."""
    left = np.ascontiguousarray(target.T)  # [K, N]: a column of the weight is a row here
    values = np.empty(left.shape, np.int8)
    num_channels = len(left)
    for start in range(0, num_channels, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, num_channels)
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for idx in range(start, stop):
            rounded = np.clip(np.rint(left[idx] / scales), -127, 127)
            values[idx] = rounded
            error = (left[idx] - rounded * scales) / factor[idx, idx]
            left[idx + 1 : stop] -= factor[idx, idx + 1 : stop, None] * error
            errors[idx - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(values.T)
