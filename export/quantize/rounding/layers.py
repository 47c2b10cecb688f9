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


Layers = Mapping[Site, Int8Layer | BlockLayer | None]
"""Every linear layer of a model but routers, or none at all. None: stored as floats or as the precision says."""


class QuantizedLayers:
    """Hands the layers to one graph, each once; both sides must agree on which there are."""

    def __init__(self, layers: Layers) -> None:
        self._layers, self._left = layers, set(layers)

    def take(self, linear: Linear) -> Int8Layer | ImportedRows | None:
        """The layer's integers; None if there are none. CalibrationFailed for a layer that nobody decided about."""
        if self._layers and linear.is_quantizable and linear.site not in self._layers:
            raise CalibrationFailed(f"the graph has a layer {linear.site}, and quantization knew of none")
        self._left.discard(linear.site)
        found = self._layers.get(linear.site)
        return found.load() if isinstance(found, BlockLayer) else found

    def check_all_taken(self) -> None:
        """CalibrationFailed, naming one, if the graph has no place for a layer that was quantized."""
        if left := sorted(site for site in self._left if self._layers[site] is not None):
            raise CalibrationFailed(f"{left[0]} was quantized, and the graph has no such layer")


def undecided(config: ModelConfig) -> dict[Site, Int8Layer | BlockLayer | None]:
    """Every layer that can be quantized, with no integers yet."""
    return {linear.site: None for linear in config.linears if linear.is_quantizable}


def layers_of_checkpoint(checkpoint: Checkpoint, config: ModelConfig) -> Layers:
    """Of a checkpoint that a GPTQ or AWQ tool has quantized."""

    def layer(linear: Linear) -> BlockLayer:
        def load() -> ImportedRows | None:
            parts = [checkpoint.imported(name) for name in linear.weight_names]
            whole = [part for part in parts if part is not None]
            return stacked(whole) if len(whole) == len(parts) else None

        return BlockLayer(load)

    return {linear.site: layer(linear) for linear in config.linears if linear.is_quantizable}
