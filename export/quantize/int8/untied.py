"""A checkpoint whose LM head is a matrix of its own, so that it can change without the embedding."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.view import CheckpointView
from export.model.description import LM_HEAD, ModelConfig

_HEAD = f"{LM_HEAD}.weight"


class UntiedCheckpoint(CheckpointView):
    """The checkpoint of `config.untied()`: its LM head is a copy of the embedding."""

    def __init__(self, base: Checkpoint, config: ModelConfig) -> None:
        super().__init__(base)
        self._embedding = f"{config.embedding.name}.weight"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        tensors = self._base.tensors
        return {**tensors, _HEAD: tensors[self._embedding]}

    def load(self, name: str) -> NDArray[np.float32]:
        return self._base.load(self._embedding if name == _HEAD else name)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        return self._base.pieces(self._embedding if name == _HEAD else name)


def untied_as(base: Checkpoint, config: ModelConfig, changed: ModelConfig) -> Checkpoint:
    """`base`, whose configuration is `config`, with an LM head of its own if only `changed` has one."""
    unties = config.tie_word_embeddings and not changed.tie_word_embeddings
    return UntiedCheckpoint(base, config) if unties else base
