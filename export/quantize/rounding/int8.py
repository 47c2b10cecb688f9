"""Weights to int8, one scale an output channel, and activations to int8 with one scale: the arithmetic, in numpy.

    weight ~ values * scale[:, None]   int8 -127 .. 127
    x      ~ rint(x / scale) * scale   -128 .. 127: uint8 with zero point 128 on x86, int8 with 0 on TensorRT

`rounded_to_nearest` takes each weight alone; `error_compensated` lets the columns still to be rounded make up for
those that were (GPTQ): see error_compensation.py.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.quantize.rounding.gptq import Grid, Moments, problem_of, rounded_codes

Array = NDArray[np.float32]

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


def error_compensated(weight: Array, moments: Moments) -> Int8Rows:
    """Round float32 `[N, K]` so that its product with the rounded input stays near the exact one."""
    scales = weight_scales(weight)
    problem = problem_of(moments)
    if problem is None:
        return rounded_to_nearest(weight)
    values = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), OUTPUTS_AT_ONCE):
        some = slice(start, start + OUTPUTS_AT_ONCE)
        end = np.full((1, len(scales[some])), 127, np.float32)
        grid = Grid(scales[None, some], -end, end, weight.shape[1])
        values[some] = rounded_codes(problem.target(weight[some]), problem, grid)
    return Int8Rows(values, scales)
