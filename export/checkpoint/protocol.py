"""What export reads: named tensors, a config.json and the text files that go with them.

Three sources, one protocol: `safetensors_checkpoint.py` (a local Hugging Face directory), `gguf_checkpoint.py`
(one .gguf file), `hub.py` (a hub id, downloaded and then read as a directory).
Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), whatever the source calls them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class TensorInfo(NamedTuple):
    """Shape and stored type of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """A model on disk. Nothing is read before it is asked for, and nothing is kept after."""

    @property
    def source(self) -> str:
        """What the user called it, for the manifest: hub id, directory or file name. No absolute paths."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as parsed."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape, by Hugging Face name."""
        ...

    def load(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32 (bf16, fp16 are widened). InvalidCheckpoint if missing, cut or not finite."""
        ...

    def text_files(self) -> Mapping[str, str]:
        """The text files there are by name, tokenizer.json and others: see `directory_texts.py`. InvalidCheckpoint."""
        ...
