"""Computes cosine and sine tables of rotary position embeddings, with extensions for longer contexts.

Sources: RoFormer (arXiv:2104.09864), linear interpolation (arXiv:2306.15595), Llama 3.1's frequency bands
(its model card and transformers' `rope_type: llama3`), YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753), Hunyuan's
fixed factor of the base (`ntk`, transformers' code of the model).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.model.description import RopeConfig


class RopeTables(NamedTuple):
    """cos and sin, float32 `[max_len, dim / 2]`, the attention factor multiplied in."""

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]


def rope_tables(rope: RopeConfig, dim: int, max_len: int) -> RopeTables:
    """Tables of `dim` channels for positions 0 .. max_len - 1.

    Frequencies and angles are rounded to float32 where transformers rounds them: at position 8,000 the angle's
    rounding alone is 5e-4, so tables of higher precision would be further from what the model was trained with.
    """
    frequencies = inverse_frequencies(rope, dim).astype(np.float32)
    angles = np.arange(max_len, dtype=np.float32)[:, None] * frequencies
    scale = np.float32(attention_factor(rope))
    return RopeTables(np.cos(angles) * scale, np.sin(angles) * scale)


def inverse_frequencies(rope: RopeConfig, dim: int) -> NDArray[np.float64]:
    """Radians per position of each rotated pair, float64 `[dim / 2]`."""
    theta = rope.theta * rope.factor ** (dim / (dim - 2)) if rope.kind == "ntk" else rope.theta
    base = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base, dim)
    if rope.kind == "longrope":
        return np.asarray(base / np.array(rope.long_factors if rope.is_long else rope.short_factors))
    return base


def attention_factor(rope: RopeConfig) -> float:
    """The factor of cos and sin: YaRN's sqrt(1/t), LongRoPE's function of the two lengths, 1 for other kinds."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    own = rope.long_scale if rope.is_long else rope.short_scale
    if own is not None:
        return own
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_len))
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, base: NDArray[np.float64]) -> NDArray[np.float64]:
    """Long wavelengths are stretched by `factor`, short ones are kept, and those between are interpolated."""
    turns = rope.original_max_len * base / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return np.asarray((1 - blend) * base / rope.factor + blend * base)


def _yarn(rope: RopeConfig, base: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Frequencies with fewer than beta_slow turns in the trained length are stretched, fast ones are kept."""

    def dimension(turns: float) -> float:
        return dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # transformers' guard against a division by zero
    stretched = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return np.asarray(base / rope.factor * stretched + base * (1 - stretched))
