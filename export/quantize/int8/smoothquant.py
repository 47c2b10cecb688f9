"""SmoothQuant (arXiv:2211.10438): move magnitude from activations into weights, exactly, in the checkpoint.

Each linear layer's input is divided by a vector, one value per channel, and the layer's columns are multiplied by it.
The division is folded into the tensor that produces the input, so it costs nothing at run time:

    a norm that this layer alone reads    the norm's weight, and its bias
    attention's values (o)                the rows of v: one value for all query heads that share a key-value head
    a gated MLP's activations (down)      the rows of up

A layer with another input is not smoothed. In float32, the smoothed checkpoint computes the same as the original.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView
from export.model.description import Mlp, ModelConfig, Norm, Part, Site
from export.quantize.int8.untied import untied_as

Array = NDArray[np.float32]


# Lower bound of magnitudes and vectors, so that smoothed weights stay normal numbers in half precision.
_FLOOR = np.float32(1e-5)


def producer_of(config: ModelConfig, site: Site) -> Norm | Part | None:
    """The norm or matrix that produces a site's input and that a division can be folded into, exactly.

    None if there is none: a norm that several sites read would have to be divided by several vectors, a norm may have
    no weight, a layer may read the stream without a norm, values may be clipped, and an MLP without a gate is not
    linear in any matrix. The output of a recurrence is not smoothed.
    """
    linear = config.by_site[site]
    if linear.reads is not None and not linear.reads.has_weight:
        return None
    if linear.reads is not None:
        if site == config.head.linear.site:
            return linear.reads
        return linear.reads if len(config.blocks[site.layer].readers_of(linear.reads)) == 1 else None
    block = config.blocks[site.layer]
    if linear.role == "o":
        is_plain = block.attention.latent is None and block.attention.clip is None
        return block.attention.qkv.parts[-1] if is_plain else None
    if linear.role == "mix_out":
        return None
    mlps = [block.mlp] if isinstance(block.mlp, Mlp) else block.mlp.mlps
    gated = (mlp.up.parts[-1] for mlp in mlps if mlp.down == linear and mlp.is_gated and mlp.clamp is None)
    return next(gated, None)


def smoothing_vector(
    highest: Array, weight_highest: Array, strength: float, *, site: Site, config: ModelConfig
) -> Array:
    """The vector that divides a site's input, `[K]`: highest^strength / weight_highest^(1 - strength).

    highest: largest magnitude of each input channel; weight_highest: of each weight column. The value is 1 for channels
    that are 0 in either, and for an input without a producer. Query heads that share a key-value head get the largest
    of their values.
    """
    if producer_of(config, site) is None:
        return np.ones_like(highest)
    dead = (highest < _FLOOR) | (weight_highest < _FLOOR)
    ratio = np.maximum(highest, _FLOOR) ** strength / np.maximum(weight_highest, _FLOOR) ** (1 - strength)
    vector = np.where(dead, np.float32(1), np.maximum(ratio, _FLOOR)).astype(np.float32)
    if config.by_site[site].role != "o":
        return vector
    grouped = vector.reshape(config.num_kv_heads, -1, config.head_dim).max(1, keepdims=True)
    return np.broadcast_to(
        grouped, (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    ).reshape(-1)


class SmoothedCheckpoint(CheckpointView):
    """A checkpoint with the smoothing vectors of some sites folded into its tensors.

    If the LM head has a vector, a tied head becomes a matrix of its own, because the embedding must not change.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, vectors: Mapping[Site, Array]) -> None:
        smoothed = smoothed_config(config, vectors)
        super().__init__(untied_as(checkpoint, config, smoothed))
        self._divide: dict[str, Array] = {}  # by tensor name: of its rows
        self._multiply: dict[str, Array] = {}  # of its columns
        self._adds_one: set[str] = set()
        self._fold(smoothed, vectors)

    def load(self, name: str) -> Array:
        array = self._base.load(name)
        divide, multiply = self._divide.get(name), self._multiply.get(name)
        if divide is not None and name in self._adds_one:
            return (array + np.float32(1)) / divide - np.float32(1)
        if divide is not None:
            array = array / (divide if array.ndim == 1 else divide[:, None])
        return array if multiply is None else array * multiply

    def pieces(self, name: str) -> Iterator[Array]:
        if name in self._divide:
            yield from super().pieces(name)
        else:
            multiply = self._multiply.get(name)
            yield from (piece if multiply is None else piece * multiply for piece in self._base.pieces(name))

    def _fold(self, config: ModelConfig, vectors: Mapping[Site, Array]) -> None:
        for site, vector in vectors.items():
            linear, producer = config.by_site[site], producer_of(config, site)
            if producer is None:
                continue
            self._multiply |= dict.fromkeys(linear.weight_names, vector)
            rows = vector
            if linear.role == "o":  # all query heads of a key-value head have the same vector
                rows = vector.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
            self._divide |= {f"{producer.name}.weight": rows, f"{producer.name}.bias": rows}
            if isinstance(producer, Norm) and producer.adds_one:
                self._adds_one.add(f"{producer.name}.weight")

    def row_divisor(self, name: str) -> Array | None:
        """The vector that divides a tensor's rows; None if nothing does."""
        return self._divide.get(name)


def smoothed_config(config: ModelConfig, vectors: Mapping[Site, Array]) -> ModelConfig:
    """The smoothed checkpoint's configuration: an LM head with a smoothing vector is not tied."""
    return config.untied() if config.tie_word_embeddings and config.head.linear.site in vectors else config
