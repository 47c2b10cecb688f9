"""Static scales of an int8 KV cache, one for each channel of each key-value head, from calibration statistics.

A key is stored after its rotary embedding, which turns each pair of channels by an angle that
grows with the position. Maxima seen at positions below 512 say little about one channel at position 8,000, but turning
keeps a pair's length: so both channels of a pair get one scale, from the length that the two maxima allow.

Nothing is clipped below the calibrated maximum. SmolLM2-135M, perplexity and KL over 2,048 held-out tokens against
float32, the rest of the model in float32: see `MEASURED` in tests/graph/test_kv_int8.py for how to repeat it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.model.description import Attention, ModelConfig, Site
from export.quantize.statistics.activation_stats import Statistics

Array = NDArray[np.float32]

PER_CHANNEL = "per channel"

_LARGEST = np.float32(127)
# A channel that never fires still needs a scale; its values are stored as 0 either way.
_FLOOR = np.float32(1e-8)


class KvScales(NamedTuple):
    """Of one layer: float32 `[kv_heads * head_dim]` each; what is stored is round(x / scale) as int8."""

    key: Array
    value: Array

    def of(self, kv: str) -> Array:
        """By the cache tensors' letter, k or v."""
        return self.key if kv == "k" else self.value


def kv_scales(
    statistics: Statistics, config: ModelConfig, value_divisors: Sequence[Array | None] | None = None
) -> list[KvScales]:
    """Scales of every layer from the largest magnitudes of `Site(layer, "k")` and `Site(layer, "v")`.

    value_divisors: of each layer, what smoothing divides the values' rows by, `[kv_heads * head_dim]`; None if not
    """
    scales = []
    for layer in range(config.num_layers):
        key = pair_lengths(statistics[Site(layer, "k")].highest, config.blocks[layer].attention)
        value = statistics[Site(layer, "v")].highest
        divisor = value_divisors[layer] if value_divisors is not None else None
        if divisor is not None:
            value = value / divisor
        scales.append(KvScales(_steps(key), _steps(value)))
    return scales


def pair_lengths(highest: Array, attention: Attention) -> Array:
    """How large each channel of a key can get as its pair turns, from the largest magnitudes that were seen.

    highest: `[kv_heads * head_dim]`; channels that do not turn keep their own
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
