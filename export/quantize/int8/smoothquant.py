"""Move magnitude from activations into weights, exactly: SmoothQuant (arXiv:2211.10438) folded into the checkpoint.

Every linear layer's input is divided by a vector, channel by channel, and the layer's columns multiplied by it. The
division costs nothing at run time, because it is folded into what makes the input:

    a norm that this layer alone reads    the norm's weight, and its bias
    attention's values (o)                the rows of v: one value for all query heads that share a key-value head
    a gated MLP's activations (down)      the rows of up

Where none of these makes the input, the layer is not smoothed. The product is the same checkpoint in other units: run
in float32 it computes what the original computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.view import CheckpointView
from export.model.description import LM_HEAD, Mlp, ModelConfig, Norm, Part, Site

Array = NDArray[np.float32]

_HEAD = f"{LM_HEAD}.weight"

# Vectors stay within these powers of ten, so that no weight leaves half precision's normal numbers for another.
_FLOOR = np.float32(1e-5)


def producer_of(config: ModelConfig, site: Site) -> Norm | Part | None:
    """What makes a site's input and can take a division, exactly: a norm, or rows of another matrix.

    None where nothing can: a norm that several sites read would have to be divided by the vector of each, and an
    activation without a gate is not linear in anything.
    """
    linear = config.by_site[site]
    if linear.reads is not None:
        if site == config.head.linear.site:
            return linear.reads
        return linear.reads if len(config.blocks[site.layer].readers_of(linear.reads)) == 1 else None
    block = config.blocks[site.layer]
    if linear == block.attention.o:
        return block.attention.qkv.parts[-1]
    mlps = [block.mlp] if isinstance(block.mlp, Mlp) else block.mlp.experts
    mlp = next(mlp for mlp in mlps if mlp.down == linear)
    return mlp.up.parts[-1] if mlp.is_gated else None


def smoothing_vector(
    highest: Array, weight_highest: Array, strength: float, *, site: Site, config: ModelConfig
) -> Array:
    """What a site's input is divided by, `[K]`: highest^strength / weight_highest^(1 - strength).

    highest: largest magnitude of each input channel; weight_highest: of each weight column. Channels that are dead
    on either side keep 1, and so does an input that nothing can divide. For attention's output the channels of the
    heads that share a key-value head get their largest value.
    """
    if producer_of(config, site) is None:
        return np.ones_like(highest)
    dead = (highest < _FLOOR) | (weight_highest < _FLOOR)
    wide = np.maximum(highest, _FLOOR) ** strength / np.maximum(weight_highest, _FLOOR) ** (1 - strength)
    vector = np.where(dead, np.float32(1), np.maximum(wide, _FLOOR)).astype(np.float32)
    if config.by_site[site].role != "o":
        return vector
    grouped = vector.reshape(config.num_kv_heads, -1, config.head_dim).max(1, keepdims=True)
    return np.broadcast_to(
        grouped, (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    ).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Fold:
    """How one tensor changes: rows (or a vector) divided, columns multiplied. adds_one: it is w of a 1 + w norm."""

    divide: Array | None
    multiply: Array | None
    adds_one: bool


class SmoothedCheckpoint(CheckpointView):
    """A checkpoint whose tensors carry the smoothing vectors of some sites; the others are left as they are.

    With a vector for the LM head, a tied head becomes a matrix of its own: the embedding cannot take the vector.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, vectors: Mapping[Site, Array]) -> None:
        super().__init__(checkpoint)
        self._folds = _folds(smoothed_config(config, vectors), vectors)
        self._embedding = f"{config.embedding.name}.weight"
        self._unties = config.tie_word_embeddings and config.head.linear.site in vectors

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        tensors = self._base.tensors
        return {**tensors, _HEAD: tensors[self._embedding]} if self._unties else tensors

    def load(self, name: str) -> Array:
        array = self._base.load(self._embedding if self._unties and name == _HEAD else name)
        fold = self._folds.get(name)
        if fold is None:
            return array
        if fold.adds_one and fold.divide is not None:
            return (array + np.float32(1)) / fold.divide - np.float32(1)
        if fold.divide is not None:
            array = array / (fold.divide if array.ndim == 1 else fold.divide[:, None])
        return array if fold.multiply is None else array * fold.multiply

    def row_divisor(self, name: str) -> Array | None:
        """What the rows of a tensor were divided by, None if they were not."""
        fold = self._folds.get(name)
        return None if fold is None else fold.divide


def smoothed_config(config: ModelConfig, vectors: Mapping[Site, Array]) -> ModelConfig:
    """The configuration of the smoothed checkpoint: its LM head is no longer tied if it has a vector."""
    return config.untied() if config.tie_word_embeddings and config.head.linear.site in vectors else config


def _folds(config: ModelConfig, vectors: Mapping[Site, Array]) -> dict[str, _Fold]:
    """By tensor name."""
    divide: dict[str, Array] = {}
    multiply: dict[str, Array] = {}
    adds_one: set[str] = set()
    for site, vector in vectors.items():
        linear, producer = config.by_site[site], producer_of(config, site)
        if producer is None:
            continue
        multiply |= dict.fromkeys(linear.weight_names, vector)
        rows = _shared(vector, config) if linear.role == "o" else vector
        divide |= {f"{producer.name}.weight": rows, f"{producer.name}.bias": rows}
        if isinstance(producer, Norm) and producer.adds_one:
            adds_one.add(f"{producer.name}.weight")
    return {
        name: _Fold(divide.get(name), multiply.get(name), name in adds_one) for name in divide.keys() | multiply.keys()
    }


def _shared(o: Array, config: ModelConfig) -> Array:
    """One value for each row of the values: the vector is the same for all query heads of a key-value head."""
    return o.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
