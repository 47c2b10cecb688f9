"""The text model of a checkpoint that also sees images: its config is in `text_config`.

Only the text model is exported. Tensors for images, or for drafting further tokens, are left out by name.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown
from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.view import CheckpointView
from export.storage.quantized_rows import ImportedRows
from runtime.errors import InvalidCheckpoint

LEFT_OUT: Mapping[str, str] = MappingProxyType(dict.fromkeys(("qwen3_5", "qwen3_5_moe"), r"(model\.visual|mtp)\..*"))
"""By the `model_type` of the whole, a pattern for the names of tensors that the text model has not."""


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a checkpoint, or the checkpoint itself if there is nothing else in it."""
    left_out = LEFT_OUT.get(str(checkpoint.config.get("model_type")))
    return checkpoint if left_out is None or "text_config" not in checkpoint.config else TextPart(checkpoint, left_out)


class TextPart(CheckpointView):
    """The base without some tensors, and with the inner config. InvalidCheckpoint if `text_config` is no object."""

    def __init__(self, base: Checkpoint, left_out: str) -> None:
        super().__init__(base)
        text = base.config["text_config"]
        if not isinstance(text, dict):
            raise InvalidCheckpoint(f"config.json: text_config must be an object, got {shown(text)}")
        # Where both say something, transformers ties the whole model by the outer field.
        outer = {name: base.config[name] for name in ("tie_word_embeddings",) if name in base.config}
        self._config: Mapping[str, Any] = {**text, **outer}
        self._tensors = MappingProxyType(
            {name: info for name, info in base.tensors.items() if not re.fullmatch(left_out, name)}
        )

    @property
    def notes(self) -> tuple[str, ...]:
        left_out = len(self._base.tensors) - len(self._tensors)
        return (*self._base.notes, f"only the text model is exported: {left_out} tensors of other parts are left out")

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._base.load_rows(name, start, stop)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        return self._base.pieces(name)

    def imported(self, name: str) -> ImportedRows | None:
        return self._base.imported(name)
