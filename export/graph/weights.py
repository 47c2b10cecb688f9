"""Reads a checkpoint's tensors in the shapes and types that graphs need. Knows no operators."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import Linear, ModelConfig, Norm
from runtime.errors import InvalidCheckpoint


class Weight(NamedTuple):
    """The float32 matrix `[N, K]` of a linear layer or of the embedding, read when `load` is called.

    name: its name in graphs; role: see `Linear`, schemes choose a form by it
    """

    name: str
    role: str
    shape: tuple[int, int]
    load: Callable[[], NDArray[np.float32]]


class NormArrays(NamedTuple):
    """A norm's weight and bias, `[channels]`, in the type that the graph computes norms in."""

    weight: NDArray[Any]
    bias: NDArray[Any] | None


class GraphWeights:
    """Reads a checkpoint tensor by tensor. InvalidCheckpoint names a tensor that does not fit config.json."""

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype[Any]) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def matrix(self, linear: Linear) -> Weight:
        """The stacked parts of a linear layer."""
        names = linear.weight_names

        def load() -> NDArray[np.float32]:
            parts = [self._load(name, 2) for name in names]
            matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if matrix.shape != linear.shape:
                raise InvalidCheckpoint(
                    f"{', '.join(names)}: together {matrix.shape}, and config.json means {linear.shape}"
                )
            return matrix

        name = f"{names[0]}+{len(names) - 1}" if len(names) > 1 else names[0]
        return Weight(name, linear.role, linear.shape, load)

    def embedding(self, config: ModelConfig) -> Weight:
        """The token embeddings `[vocab_size, hidden_size]`."""
        name, shape = config.embedding.name, (config.vocab_size, config.hidden_size)
        return Weight(f"{name}.weight", "embedding", shape, lambda: self.table(name))

    def bias(self, linear: Linear) -> NDArray[Any]:
        """The concatenated biases of a linear layer, `[N]`."""
        parts = [self._load(name, 1) for name in linear.bias_names]
        return np.concatenate(parts).astype(self._dtype, copy=False)

    def norm(self, norm: Norm) -> NormArrays:
        """A norm's arrays; for a 1 + w norm, 1 is added before the weight is rounded to the graph's type."""
        weight = self._load(f"{norm.name}.weight", 1) if norm.has_weight else np.ones(norm.size, np.float32)
        weight = weight + np.float32(1) if norm.adds_one else weight
        bias = self._load(f"{norm.name}.bias", 1).astype(self._dtype, copy=False) if norm.has_bias else None
        return NormArrays(weight.astype(self._dtype, copy=False), bias)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A tensor of one dimension that belongs to no norm and no linear layer, float32."""
        return self._checkpoint.load(name).reshape(-1)

    def table(self, name: str) -> NDArray[np.float32]:
        """A table of embeddings or positions, float32 `[rows, hidden]`."""
        return self._load(f"{name}.weight", 2)

    def tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor that is neither a matrix, a norm nor a table, in the graph's type."""
        array = self._checkpoint.load(name)
        if array.shape != shape:
            raise InvalidCheckpoint(f"{name} has shape {array.shape}, and config.json means {shape}")
        return array.astype(self._dtype, copy=False)

    def _load(self, name: str, num_dims: int) -> NDArray[np.float32]:
        array = self._checkpoint.load(name)
        if array.ndim != num_dims:
            raise InvalidCheckpoint(f"{name} has shape {array.shape}, which does not fit config.json")
        return array
