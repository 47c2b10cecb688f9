"""The base class of checkpoints that wrap another one: it passes on everything that a subclass does not change."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo


class CheckpointView(Checkpoint):
    """A checkpoint that reads everything from `base`. A subclass overrides what it changes.

    `imported` and the fast `load_rows` and `pieces` are not passed on: in a subclass that changes weights they would be
    wrong.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    @property
    def source(self) -> str:
        return self._base.source

    @property
    def config(self) -> Mapping[str, Any]:
        return self._base.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._base.tensors

    def load(self, name: str) -> NDArray[np.float32]:
        return self._base.load(name)

    def text_files(self) -> Mapping[str, str]:
        return self._base.text_files()

    def stored_name(self, name: str) -> str:
        return self._base.stored_name(name)

    def file_of(self, name: str) -> str | None:
        return self._base.file_of(name)

    @property
    def stored_bits(self) -> int | None:
        return self._base.stored_bits

    @property
    def conversion(self) -> str | None:
        return self._base.conversion

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._base.provenance

    @property
    def has_input_scales(self) -> bool:
        return self._base.has_input_scales

    @property
    def notes(self) -> tuple[str, ...]:
        return self._base.notes

    @property
    def commit(self) -> str | None:
        return self._base.commit


class HeldTensors(CheckpointView):
    """A checkpoint that keeps what it has read, for a few tensors that are read several times."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        self._held: dict[str, NDArray[np.float32]] = {}

    def load(self, name: str) -> NDArray[np.float32]:
        if name not in self._held:
            self._held[name] = self._base.load(name)
        return self._held[name]


class PrefixedView(CheckpointView):
    """A checkpoint that was saved without the LM head around it: its names lack the prefix that others have."""

    def __init__(self, base: Checkpoint, prefix: str, *, unprefixed: str) -> None:
        """unprefixed: the one name that stays as it is."""
        super().__init__(base)
        self._names = {name if name == unprefixed else f"{prefix}.{name}": name for name in base.tensors}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: self._base.tensors[stored] for name, stored in self._names.items()}

    def load(self, name: str) -> NDArray[np.float32]:
        return self._base.load(self._names.get(name, name))

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._base.load_rows(self._names.get(name, name), start, stop)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        return self._base.pieces(self._names.get(name, name))

    def stored_name(self, name: str) -> str:
        return self._base.stored_name(self._names.get(name, name))

    def file_of(self, name: str) -> str | None:
        return self._base.file_of(self._names.get(name, name))
