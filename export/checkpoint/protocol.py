"""What export reads: named tensors, a config.json and the text files that go with them.

Two readers: `safetensors_dir.py` (a Hugging Face directory, local or from the hub) and `gguf/file.py` (one .gguf file).
A class that changes tensors is a view of another checkpoint: see `view.py`.
Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), also where the file has other names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.storage.quantized_rows import ImportedRows

PIECE_ROWS = 2048
"""Rows of a piece of a matrix: 16 MB with 2,048 columns."""


class TensorInfo(NamedTuple):
    """Shape and stored type of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(ABC):
    """A model on disk. Reads a tensor when it is asked for and keeps none."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The user's name for the checkpoint, for the manifest: hub id, directory or file name; no absolute path."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """config.json as parsed."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and stored type, by Hugging Face name."""

    @abstractmethod
    def load(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32. InvalidCheckpoint if it is missing, cut short or not finite."""

    @abstractmethod
    def text_files(self) -> Mapping[str, str]:
        """The text files by name, tokenizer.json and others: see `texts/directory.py`. InvalidCheckpoint."""

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read rows `start` to `stop` (first axis) as float32; some checkpoints read nothing else from the disk."""
        return self.load(name)[start:stop]

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The rows of a matrix in order, at most PIECE_ROWS at a time: for one that is too large to hold as float32."""
        whole = self.load(name)
        yield from (whole[start : start + PIECE_ROWS] for start in range(0, len(whole), PIECE_ROWS))

    def row_pieces(self, name: str, num_rows: int) -> Iterator[NDArray[np.float32]]:
        """`pieces` for a checkpoint whose `load_rows` reads nothing else from the disk."""
        for start in range(0, num_rows, PIECE_ROWS):
            yield self.load_rows(name, start, min(start + PIECE_ROWS, num_rows))

    def imported(self, name: str) -> ImportedRows | None:
        """The integers of a weight that is quantized already; None for one that is not."""
        return None

    def stored_name(self, name: str) -> str:
        """The name of the tensor in the files that holds `name`, for messages."""
        return name

    def file_of(self, name: str) -> str | None:
        """The name of the file that holds a tensor, for messages; None if there is only one file."""
        return None

    @property
    def stored_bits(self) -> int | None:
        """Bits of the integers that a quantization tool left; None if there are none."""
        return None

    @property
    def conversion(self) -> str | None:
        """How the weights are made from the files, for messages; None if the files hold them as they are."""
        return None

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Further facts about the weights' origin for the receipt; JSON-able."""
        return {}

    @property
    def has_input_scales(self) -> bool:
        """Whether a tool also chose static scales of int8 inputs."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: what an export does otherwise than the checkpoint's tool."""
        return ()

    @property
    def commit(self) -> str | None:
        """The hub commit that was downloaded, 40 hex digits; None if the model is not from the hub."""
        return None
