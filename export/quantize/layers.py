"""Linear layers whose weights are integers already, by site: what calibration or the checkpoint hands to a graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from export.checkpoint.protocol import Checkpoint
from export.model.description import Linear, ModelConfig, Site
from export.quantize.rounding.int8 import Int8Rows
from export.storage.quantized_rows import ImportedRows, stacked
from runtime.errors import CalibrationFailed


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """A layer that multiplies in int8: its input's scale, and its rounded weights, read when asked for.

    fine_scale: of the second pass over the input; None has one pass
    """

    scale: float
    fine_scale: float | None
    load: Callable[[], Int8Rows]


@dataclass(frozen=True, slots=True)
class BlockLayer:
    """A layer whose weights are blocks of integers; `load` gives None where the checkpoint holds it as floats."""

    load: Callable[[], ImportedRows | None]


Layers = Mapping[Site, Int8Layer | BlockLayer]


class QuantizedLayers:
    """Hands each layer to a graph once. A layer that no graph takes is an error, see `check_all_taken`."""

    def __init__(self, layers: Layers, *, is_complete: bool = False) -> None:
        """is_complete: every linear layer must be there, but for routers."""
        self._layers, self._is_complete = layers, is_complete
        self._left = set(layers)

    def take(self, linear: Linear) -> Int8Layer | ImportedRows | None:
        """The layer's integers; None if it is stored as the precision says. CalibrationFailed if it is missing."""
        found = self._layers.get(linear.site)
        if found is None:
            if self._is_complete and linear.is_quantizable:
                raise CalibrationFailed(f"{linear.site} was not calibrated; the calibration is of another model")
            return None
        self._left.discard(linear.site)
        return found.load() if isinstance(found, BlockLayer) else found

    def check_all_taken(self) -> None:
        """CalibrationFailed, naming one, if the graph has no place for a layer that was quantized."""
        if self._left:
            raise CalibrationFailed(f"{min(self._left)} was quantized, and the graph has no such layer")


def layers_of_checkpoint(checkpoint: Checkpoint, config: ModelConfig) -> Layers:
    """Of a checkpoint that a GPTQ or AWQ tool has quantized."""

    def layer(linear: Linear) -> BlockLayer:
        def load() -> ImportedRows | None:
            parts = [checkpoint.imported(name) for name in linear.weight_names]
            whole = [part for part in parts if part is not None]
            return stacked(whole) if len(whole) == len(parts) else None

        return BlockLayer(load)

    return {linear.site: layer(linear) for linear in config.linears}
