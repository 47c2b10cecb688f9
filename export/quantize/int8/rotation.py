"""Rotate the residual stream and the values of each head, exactly: QuaRot (arXiv:2404.00456, also 2405.16406).

A root mean square norm commutes with every orthogonal matrix once its weight is folded into the layers behind it. So
the stream can be written in another basis at no cost at run time: embedding rows and the outputs of o and down times R,
the inputs of qkv, gate_up and the LM head times R too. In a basis that mixes all channels no channel stands out, and
one int8 range fits all of them; a massive activation of one token is spread over its channels. The values of a head
are mixed in the same way between v and o. What enters down has no such freedom: SiLU lies in between.

    R = D (Q x H)      D random signs, H a Hadamard matrix of the largest power of two, Q random orthogonal for the rest

On SmolLM2-135M, all layers in int8 and down in two passes, weights rounded to nearest, 2,048 tokens of held-out text:
KL 0.0059 against 0.0073 without rotation, 0.0048 with error compensation.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.view import CheckpointView
from export.model.config import ModelConfig

Array = NDArray[np.float32]

_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_READERS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
"""Projections that read the stream, and the norm in front of each."""
_WRITERS = ("o_proj", "down_proj")

# Kronecker factors up to this size are one small product each; a Hadamard matrix of 4096 is two of 64.
_LARGEST_FACTOR = 64

# Every factor makes a copy; of an LM head that would be gigabytes.
_ROWS_AT_ONCE = 4096


class Rotation:
    """An orthogonal matrix of n rows as a Kronecker product of small ones, after signs. The same for the same n."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(n)
        power = n & -n
        rest = n // power
        factors = [np.linalg.qr(rng.standard_normal((rest, rest)))[0]] if rest > 1 else []
        while power > 1:
            factors.append(_hadamard(min(power, _LARGEST_FACTOR)))
            power //= len(factors[-1])
        self._factors = [factor.astype(np.float32) for factor in factors]
        self._signs = rng.choice(np.array([-1, 1], np.float32), n)

    def apply(self, x: Array) -> Array:
        """x `[..., n]` times the matrix."""
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            out[start : start + _ROWS_AT_ONCE] = self._applied(rows[start : start + _ROWS_AT_ONCE])
        return out.reshape(x.shape)

    def _applied(self, rows: Array) -> Array:
        out = rows * self._signs
        before, after = 1, rows.shape[1]
        for factor in self._factors:
            size = len(factor)
            after //= size
            out = np.matmul(factor.T, out.reshape(-1, before, size, after))
            before *= size
        return np.asarray(out.reshape(rows.shape), np.float32)

    def apply_to_rows(self, x: Array) -> Array:
        """The transpose of the matrix times x `[n, m]`: rotates what a layer puts out."""
        return np.ascontiguousarray(self.apply(np.ascontiguousarray(x.T)).T)


class RotatedCheckpoint(CheckpointView):
    """A checkpoint in the rotated basis: in float32 it computes what the original does. Its norms' weights are 1."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        super().__init__(checkpoint)
        self._is_tied, self._head_dim = config.tie_word_embeddings, config.head_dim
        self._stream, self._values = Rotation(config.hidden_size), Rotation(config.head_dim)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        tensors = self._base.tensors
        return {**tensors, _HEAD: tensors[_EMBEDDING]} if self._is_tied else tensors

    def load(self, name: str) -> Array:
        array = self._base.load(_EMBEDDING if self._is_tied and name == _HEAD else name)
        if name == _EMBEDDING:
            return self._stream.apply(array)
        if name == _HEAD:
            array = array * self._base.load(_FINAL_NORM)  # the name lets the unscaled one go
            return self._stream.apply(array)
        if name == _FINAL_NORM or name.endswith("layernorm.weight"):
            return np.ones_like(array)
        prefix, _, part = name.removeprefix("model.layers.").partition(".")
        projection, suffix = part.split(".")[-2:]
        if projection in _READERS and suffix == "weight":
            norm = self._base.load(f"model.layers.{prefix}.{_READERS[projection]}.weight")
            array = self._stream.apply(array * norm)
        if projection == "v_proj":
            array = self._values_out(array)
        if projection == "o_proj" and suffix == "weight":
            array = self._values.apply(array.reshape(len(array), -1, self._head_dim)).reshape(array.shape)
        if projection in _WRITERS:
            array = self._stream.apply_to_rows(array) if suffix == "weight" else self._stream.apply(array)
        return array

    def _values_out(self, array: Array) -> Array:
        """Rows of v_proj, or its bias, mixed within each head."""
        heads = array.reshape(-1, self._head_dim, array.size // len(array))
        return self._values.apply(heads.transpose(0, 2, 1)).transpose(0, 2, 1).reshape(array.shape)


def rotated_config(config: ModelConfig) -> ModelConfig:
    """The rotated checkpoint's configuration: the final norm is in the LM head, so the embedding is another matrix."""
    return replace(config, tie_word_embeddings=False)


def _hadamard(n: int) -> NDArray[np.float64]:
    """Sylvester's, orthonormal; n a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(n))
