"""Static scales of an int8 KV cache, one for each channel of each key-value head, from calibration statistics.

A key is stored after its rotary embedding, which rotates each pair of channels by an angle that grows with the
position. A channel's maximum at positions below 512 says little about position 8,000, but a rotation keeps a pair's
length. So both channels of a pair get one scale, from the length of their two maxima.

Nothing is clipped below the calibrated maximum.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.model.description import Attention, ModelConfig, Site
from export.quantize.statistics.activation_stats import Statistics

Array = NDArray[np.float32]

PER_CHANNEL = "per channel"

_LARGEST = np.float32(127)
# Scale of a channel that is always 0.
_FLOOR = np.float32(1e-8)


class KvScales(NamedTuple):
    """One layer's scales, float32 `[kv_heads * head_dim]` each; the cache stores round(x / scale) as int8."""

    key: Array
    value: Array

    def of(self, kv: str) -> Array:
        """The scales of k or v."""
        return self.key if kv == "k" else self.value


def kv_scales(
    statistics: Statistics, config: ModelConfig, value_divisors: Mapping[int, Array | None] | None = None
) -> dict[int, KvScales]:
    """Compute the scales of every layer with attention from the largest magnitudes of `Site(layer, "k")` and
    `Site(layer, "v")`.

    value_divisors: by layer, the vector by which smoothing divides the values, `[kv_heads * head_dim]`, or None
    """
    scales = {}
    for block in config.attention_blocks:
        key = pair_lengths(statistics[Site(block.layer, "k")].highest, block.attention)
        value = statistics[Site(block.layer, "v")].highest
        divisor = value_divisors[block.layer] if value_divisors is not None else None
        if divisor is not None:
            value = value / divisor
        scales[block.layer] = KvScales(_steps(key), _steps(value))
    return scales


def pair_lengths(highest: Array, attention: Attention) -> Array:
    """The largest value that each channel of a key can have after any rotation.

    highest: largest magnitudes seen, `[kv_heads * head_dim]`; channels that do not rotate keep theirs
    """
    rotary = attention.rotary
    if rotary is None:
        return highest
    heads = highest.reshape(-1, attention.head_dim).copy()
    shape = (len(heads), rotary.dim // 2, 2) if rotary.interleaved else (len(heads), 2, rotary.dim // 2)
    pairs = heads[:, : rotary.dim].reshape(shape)
    lengths = np.sqrt(np.square(pairs).sum(2 if rotary.interleaved else 1, keepdims=True))
    heads[:, : rotary.dim] = np.broadcast_to(lengths, shape).reshape(len(heads), rotary.dim)
    return heads.reshape(-1)


def _steps(highest: Array) -> Array:
    return np.asarray(np.maximum(highest / _LARGEST, _FLOOR), np.float32)
