"""A checkpoint whose linear layers a tool has quantized: the tool's integers without another rounding, or float32.

`load` gives float32 weights under their usual names, and `imported` the integers. `config.py` chooses the format.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.quantized.config import find_layers, quantization_of
from export.checkpoint.quantized.stored_layer import StoredLayers
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.checkpoint.view import CheckpointView
from export.storage.quantized_rows import ImportedRows, to_blocks
from runtime.errors import InvalidCheckpoint


def open_directory(path: Path, *, source: str | None = None, commit: str | None = None) -> Checkpoint:
    """Open a Hugging Face directory, quantized or not. Arguments and errors are those of the two classes."""
    plain = SafetensorsCheckpoint(path, source=source, commit=commit)
    raw = quantization_of(plain)
    return plain if raw is None else QuantizedCheckpoint(plain, find_layers(plain, raw))


class QuantizedCheckpoint(CheckpointView):
    """A checkpoint over one whose tensors are quantized."""

    def __init__(self, plain: SafetensorsCheckpoint, stored: StoredLayers) -> None:
        """InvalidCheckpoint if a weight is there twice."""
        super().__init__(plain)
        self._plain, self._stored = plain, stored
        self._layers = {f"{module}.weight": layer for module, layer in sorted(stored.layers.items())}
        used = stored.unused.union(*(layer.tensors for layer in self._layers.values()))
        rest = {name: info for name, info in plain.tensors.items() if name not in used}
        twice = next((name for name in self._layers if name in rest), None)
        if twice is not None:
            raise InvalidCheckpoint(f"the checkpoint has both {twice} and its quantized form; remove one of them")
        virtual = {name: TensorInfo(layer.shape, layer.kind) for name, layer in self._layers.items()}
        self._tensors = MappingProxyType(rest | virtual)

    @property
    def config(self) -> Mapping[str, Any]:
        """Without quantization_config, which this class has applied."""
        return {name: value for name, value in self._plain.config.items() if name != "quantization_config"}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def stored_bits(self) -> int | None:
        """The fewest bits of a layer of integers; None if every layer becomes floats."""
        return min((layer.bits for layer in self._layers.values() if layer.bits is not None), default=None)

    @property
    def conversion(self) -> str:
        return f"dequantized from {self._stored.name}"

    @property
    def has_input_scales(self) -> bool:
        return any(layer.input_scale is not None for layer in self._layers.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        widened = [layer for layer in self._layers.values() if layer.bits is None]
        if not widened:
            return self._stored.notes
        some = "" if len(widened) == len(self._layers) else f" {len(widened)} of {len(self._layers)} layers:"
        note = (
            f"{self.source}:{some} {widened[0].kind} weights are widened, because no artifact holds them as they are: "
            "fp32 is exact, and other precisions round once more"
        )
        return (note, *self._stored.notes)

    def load(self, name: str) -> NDArray[np.float32]:
        if name not in self._layers:
            return self._plain.load(name)
        weight = self._layers[name].load()
        if not np.isfinite(weight).all():
            raise InvalidCheckpoint(
                f"{self.source}: {name} ({self._layers[name].kind}) holds NaN or infinity; the checkpoint is damaged, "
                "download it again or use another one"
            )
        return weight

    def imported(self, name: str) -> ImportedRows | None:
        """A weight's own integers in the layout of MatMulNBits; None for a tensor that has none."""
        layer = self._layers.get(name)
        if layer is None or layer.codes is None or layer.bits is None:
            return None
        rows = to_blocks(layer.codes(), bits=layer.bits, name=name)
        return rows if layer.input_scale is None else rows._replace(input_scale=layer.input_scale())
