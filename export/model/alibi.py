"""Slopes of ALiBi (arXiv:2108.12409): a score falls by its head's slope with every token between query and key."""

import math


def bloom_slopes(num_heads: int) -> tuple[float, ...]:
    """BLOOM's slopes: those of the power of two below num_heads, then every second one of the power above."""
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / below) for head in range(below)]
    between = [2 ** (-8 * (head + 1) / (2 * below)) for head in range(0, 2 * below, 2)]
    return (*slopes, *between[: num_heads - below])


def mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """MPT's slopes: those of the power of two above num_heads, every second one first."""
    above = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / above) for head in range(above)]
    return tuple(slopes if above == num_heads else [*slopes[1::2], *slopes[::2]][:num_heads])
