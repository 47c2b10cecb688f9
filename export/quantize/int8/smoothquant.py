"""Move magnitude from activations into weights, exactly: SmoothQuant (arXiv:2211.10438) folded into the checkpoint.

Every linear layer's input is divided by a vector, channel by channel, and the layer's columns multiplied by it. The
division costs nothing at run time, because it is folded into what makes the input:

    qkv, gate_up   the norm before them            down       the rows of up_proj
    lm_head        the final norm                  o          the rows of v_proj: one value for all query heads
                                                              that share a key-value head

The product is the same checkpoint in other units: run in float32 it computes what the original computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.view import CheckpointView
from export.model.config import ModelConfig
from export.quantize.statistics.activation_stats import Site, head_site

Array = NDArray[np.float32]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Vectors stay within these powers of ten, so that no weight leaves half precision's normal numbers for another.
_FLOOR = np.float32(1e-5)


def smoothing_vector(
    highest: Array, weight_highest: Array, strength: float, *, site: Site, config: ModelConfig
) -> Array:
    """What a site's input is divided by, `[K]`: highest^strength / weight_highest^(1 - strength).

    highest: largest magnitude of each input channel; weight_highest: of each weight column. Channels that are dead
    on either side keep 1. For `o` the channels of the heads that share a key-value head get their largest value.
    """
    dead = (highest < _FLOOR) | (weight_highest < _FLOOR)
    wide = np.maximum(highest, _FLOOR) ** strength / np.maximum(weight_highest, _FLOOR) ** (1 - strength)
    vector = np.where(dead, np.float32(1), np.maximum(wide, _FLOOR)).astype(np.float32)
    if site.kind != "o":
        return vector
    grouped = vector.reshape(config.num_kv_heads, -1, config.head_dim).max(1, keepdims=True)
    return np.broadcast_to(
        grouped, (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    ).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Fold:
    """How one tensor changes: rows (or a vector) divided, columns multiplied."""

    divide: Array | None = None
    multiply: Array | None = None


class SmoothedCheckpoint(CheckpointView):
    """A checkpoint whose tensors carry the smoothing vectors of some sites; the others are left as they are.

    With a vector for the LM head, a tied head becomes a matrix of its own: the embedding cannot take the vector.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, vectors: Mapping[Site, Array]) -> None:
        super().__init__(checkpoint)
        self._folds = _folds(config, vectors)
        self._unties = config.tie_word_embeddings and head_site(config) in vectors

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        if not self._unties:
            return self._base.tensors
        return {**self._base.tensors, _HEAD: self._base.tensors[_EMBEDDING]}

    def load(self, name: str) -> Array:
        array = self._base.load(_EMBEDDING if self._unties and name == _HEAD else name)
        fold = self._folds.get(name)
        if fold is None:
            return array
        if fold.divide is not None:
            array = array / (fold.divide if array.ndim == 1 else fold.divide[:, None])
        return array if fold.multiply is None else array * fold.multiply

    def row_divisor(self, name: str) -> Array | None:
        """What the rows of a tensor were divided by, None if they were not."""
        fold = self._folds.get(name)
        return None if fold is None else fold.divide


def smoothed_config(config: ModelConfig, vectors: Mapping[Site, Array]) -> ModelConfig:
    """The configuration of the smoothed checkpoint: its LM head is no longer tied if it has a vector."""
    return replace(config, tie_word_embeddings=config.tie_word_embeddings and head_site(config) not in vectors)


def _folds(config: ModelConfig, vectors: Mapping[Site, Array]) -> dict[str, _Fold]:
    folds: dict[str, _Fold] = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        qkv, o, gate_up, down = (vectors.get(Site(layer, kind)) for kind in ("qkv", "o", "gate_up", "down"))
        per_kv_head = None if o is None else _shared(o, config)
        folds |= {
            f"{prefix}.input_layernorm.weight": _Fold(divide=qkv),
            f"{prefix}.post_attention_layernorm.weight": _Fold(divide=gate_up),
            f"{prefix}.self_attn.q_proj.weight": _Fold(multiply=qkv),
            f"{prefix}.self_attn.k_proj.weight": _Fold(multiply=qkv),
            f"{prefix}.self_attn.v_proj.weight": _Fold(divide=per_kv_head, multiply=qkv),
            f"{prefix}.self_attn.v_proj.bias": _Fold(divide=per_kv_head),
            f"{prefix}.self_attn.o_proj.weight": _Fold(multiply=o),
            f"{prefix}.mlp.gate_proj.weight": _Fold(multiply=gate_up),
            f"{prefix}.mlp.up_proj.weight": _Fold(divide=down, multiply=gate_up),
            f"{prefix}.mlp.up_proj.bias": _Fold(divide=down),
            f"{prefix}.mlp.down_proj.weight": _Fold(multiply=down),
        }
    head = vectors.get(head_site(config))
    return folds | {"model.norm.weight": _Fold(divide=head), _HEAD: _Fold(multiply=head)}


def _shared(o: Array, config: ModelConfig) -> Array:
    """One value for each row of v_proj: the vector is the same for all query heads of a key-value head."""
    return o.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
