"""A layer's tensors out of a checkpoint, in the shapes the config means. Knows no graph and no quantization."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.storage.quantized_rows import ImportedRows, stacked
from runtime.errors import InvalidCheckpoint


class Weight(NamedTuple):
    """A weight matrix that is read when asked for: float32 `[N, K]`, N outputs of K inputs each.

    `imported` gives the integers of a checkpoint that is quantized already, None if this matrix is not.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    load: Callable[[], NDArray[np.float32]]
    imported: Callable[[], ImportedRows | None] = lambda: None


class LayerWeights:
    """Reads a checkpoint tensor by tensor; InvalidCheckpoint names one that does not fit config.json."""

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype[Any]) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def matrix(self, names: Sequence[str], kind: str, n: int, k: int) -> Weight:
        """One matrix, or several of the same input stacked: `[n, k]` in all, read when its `load` is called."""

        def load() -> NDArray[np.float32]:
            parts = [self._load(name, k) for name in names]
            matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if matrix.shape != (n, k):
                raise InvalidCheckpoint(f"{', '.join(names)}: {matrix.shape} in all, config.json means ({n}, {k})")
            return matrix

        def imported() -> ImportedRows | None:
            parts = [self._checkpoint.imported(name) for name in names]
            whole = [part for part in parts if part is not None]
            return stacked(whole) if len(whole) == len(names) else None

        full_name = f"{names[0]}+{len(names) - 1}" if len(names) > 1 else names[0]
        return Weight(full_name, kind, (n, k), load, imported)

    def vector(self, *names: str) -> NDArray[Any]:
        """Norm weights or biases, end to end, in the graph's own type."""
        parts = [self._load(name, None) for name in names]
        return np.concatenate(parts).astype(self._dtype, copy=False)

    def _load(self, name: str, num_columns: int | None) -> NDArray[np.float32]:
        array = self._checkpoint.load(name)
        wanted = 1 if num_columns is None else 2
        if array.ndim != wanted or (num_columns is not None and array.shape[1] != num_columns):
            raise InvalidCheckpoint(f"{name} has shape {array.shape}, which does not fit config.json")
        return array
