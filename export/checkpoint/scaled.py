"""A checkpoint whose tensors are multiplied by constants, which a family's code applies to activations instead."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView


class ScaledView(CheckpointView):
    """factors: by the last parts of a tensor's name, like `self_attn.k_proj.weight`."""

    def __init__(self, base: Checkpoint, factors: Mapping[str, float]) -> None:
        super().__init__(base)
        self._factors = {
            name: np.float32(factor)
            for name in base.tensors
            for ending, factor in factors.items()
            if name.endswith(f".{ending}")
        }

    def load(self, name: str) -> NDArray[np.float32]:
        return self._scaled(self._base.load(name), name)

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._scaled(self._base.load_rows(name, start, stop), name)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        yield from (self._scaled(piece, name) for piece in self._base.pieces(name))

    def _scaled(self, array: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        factor = self._factors.get(name)
        return array if factor is None else array * factor
