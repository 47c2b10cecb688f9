"""Drawing a position by its weight: the inverse of the cumulative distribution, applied to one random number."""

import numpy as np

from runtime.engine.sampling.logits import Row

_BLOCK = 256
"""Weights summed at a time: near the square root of a vocabulary, so that both levels are short."""


def inverse_cdf(weights: Row, uniform: float) -> int:
    """The position at which the running sum of weights float32 [N] passes `uniform` (0 to 1) of the whole.

    Two levels, blocks and then one block, for a running sum over a whole vocabulary takes ten times as long.
    """
    if len(weights) <= _BLOCK:
        return pass_of(weights, uniform)[0]
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    block, fraction = pass_of(sums, uniform)
    position, _ = pass_of(weights[block * _BLOCK : (block + 1) * _BLOCK], fraction)
    return block * _BLOCK + position


def pass_of(weights: Row, uniform: float) -> tuple[int, float]:
    """Where the running sum passes `uniform` of the whole, and how far into that weight, 0 to 1."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    target = uniform * cumulative[-1]
    position = int(np.searchsorted(cumulative, target, side="right"))
    if position == len(weights):  # the product rounded up to the sum: take the last weight that is not 0
        position = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    weight = float(weights[position])
    return position, min(max(1 - (float(cumulative[position]) - target) / weight, 0.0), 1.0)
