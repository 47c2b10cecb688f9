"""Round weights to int8 with a scale per output channel, and activations to int8 with one scale, in numpy.

    weight ~ values * scale[:, None]   int8 -127 .. 127
    x      ~ rint(x / scale) * scale   -128 .. 127: uint8 with zero point 128 on x86, int8 with 0 on TensorRT

Weights are rounded to nearest (`rounded_to_nearest`) or with GPTQ (`gptq_int8`, gptq.py).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.quantize.rounding.gptq import Factor, Grid, rounded_codes

Array = NDArray[np.float32]


class Int8Rows(NamedTuple):
    """int8 `[N, K]` and float32 scales `[N]`."""

    values: NDArray[np.int8]
    scales: Array

    def dequantized(self) -> Array:
        return np.asarray(self.values * self.scales[:, None], np.float32)


def weight_scales(weight: Array) -> Array:
    """One scale per row of `[N, K]`. A row of zeros gets 1: it is divided by."""
    highest = np.abs(weight).max(1)
    return np.where(highest > 0, highest / np.float32(127), np.float32(1)).astype(np.float32)


def rounded_to_nearest(weight: Array) -> Int8Rows:
    """Round float32 `[N, K]` to the nearest multiples of each row's scale."""
    scales = weight_scales(weight)
    return Int8Rows(np.rint(weight / scales[:, None]).astype(np.int8), scales)


def rounded_activations(x: Array, scale: float, fine_scale: float | None = None) -> Array:
    """Fake-quantize x to int8. With `fine_scale`, also quantize the residual (two-pass, about 16 bits)."""
    coarse = np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
    if fine_scale is None:
        return np.asarray(coarse)
    fine = np.clip(np.rint((x - coarse) / np.float32(fine_scale)), -128, 127) * np.float32(fine_scale)
    return np.asarray(coarse + fine)


def gptq_int8(weight: Array, factor: Factor | None) -> Int8Rows:
    """Round float32 `[N, K]` with GPTQ, or to nearest without a factor."""
    if factor is None:
        return rounded_to_nearest(weight)
    scales = weight_scales(weight)
    highest = np.full((1, len(scales)), 127, np.float32)
    return Int8Rows(rounded_codes(weight, factor, Grid(scales[None], -highest, highest, weight.shape[1])), scales)
