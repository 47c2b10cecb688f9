"""Inputs and errors for the tests of rounded weights."""

import numpy as np
from numpy.typing import NDArray

from export.quantize.rounding.gptq import GramMatrix
from export.storage.blocks import QuantizedRows, dequantize_rows

Floats = NDArray[np.float32]


def correlated_inputs(num: int, channels: int, seed: int = 0) -> Floats:
    """Rows `[num, channels]` of correlated channels with different ranges, as activations are."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((channels, channels)) * rng.uniform(0.05, 1, channels)
    return (rng.standard_normal((num, channels)) @ mixing).astype(np.float32)


def gram_of(x: Floats) -> GramMatrix:
    """The Gram matrix of a layer's inputs."""
    gram = GramMatrix(x.shape[1])
    gram.update(x, np.ones(len(x), np.float32))
    return gram


def output_error(exact: Floats, weight: Floats, x: Floats, rows: QuantizedRows) -> float:
    """Mean squared error of the layer's output with rounded rows on `x`, against exact rows on `exact`."""
    return float(np.square(x @ dequantize_rows(rows, bits=4).T - exact @ weight.T).mean())
