"""The quantized linear layers that calibration, or a quantized checkpoint, hands to a graph, by site."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from export.checkpoint.protocol import Checkpoint
from export.model.description import Linear, ModelConfig, Site
from export.quantize.rounding.int8 import Int8Rows
from export.storage.blocks import signed_codes
from export.storage.quantized_rows import ImportedRows, stacked
from runtime.errors import CalibrationFailed


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """A layer that multiplies in int8.

    scale: of the input; fine_scale: of the second pass over the input, None for one pass
    load: reads the int8 weights
    """

    scale: float
    fine_scale: float | None
    load: Callable[[], Int8Rows]


@dataclass(frozen=True, slots=True)
class BlockLayer:
    """A layer whose weights are blocks of integers; `load` returns None for a layer stored as floats.

    A checkpoint's layer may come with the scale of its inputs, and is then an `Int8Layer`.
    """

    load: Callable[[], ImportedRows | Int8Layer | None]


Layers = Mapping[Site, Int8Layer | BlockLayer | None]
"""Every linear layer of a model except routers, or no layer at all. A value of None: the scheme's form is used."""


class QuantizedLayers:
    """Hands each layer to one graph, and checks that the graph and quantization have the same layers."""

    def __init__(self, layers: Layers) -> None:
        self._layers, self._left = layers, set(layers)

    def take(self, linear: Linear) -> Int8Layer | ImportedRows | None:
        """The layer's integers; None if it has none. CalibrationFailed for a layer that quantization did not see."""
        if self._layers and linear.is_quantizable and linear.site not in self._layers:
            raise CalibrationFailed(f"the graph has the layer {linear.site}, which quantization did not see")
        self._left.discard(linear.site)
        found = self._layers.get(linear.site)
        return found.load() if isinstance(found, BlockLayer) else found

    def check_all_taken(self) -> None:
        """CalibrationFailed if a layer was quantized and the graph did not take it; the message names one."""
        if left := sorted(site for site in self._left if self._layers[site] is not None):
            raise CalibrationFailed(f"{left[0]} was quantized, and the graph has no such layer")


def num_experts_of(sites: Iterable[Site]) -> int:
    """How many experts have these layers."""
    return len({(site.layer, site.expert) for site in sites if site.expert is not None})


def undecided(config: ModelConfig) -> dict[Site, Int8Layer | BlockLayer | None]:
    """A `Layers` with every layer that can be quantized, and no integers yet."""
    return {linear.site: None for linear in config.linears if linear.is_quantizable}


def layers_of_checkpoint(checkpoint: Checkpoint, config: ModelConfig, *, multiplies_int8: bool) -> Layers:
    """The layers of a checkpoint that a tool has quantized.

    multiplies_int8: whether a layer with a stored scale of its inputs multiplies in int8, as its tool meant it
    """

    def layer(linear: Linear) -> BlockLayer:
        def load() -> ImportedRows | Int8Layer | None:
            parts = [checkpoint.imported(name) for name in linear.weight_names]
            whole = [part for part in parts if part is not None]
            rows = stacked(whole) if len(whole) == len(parts) else None
            if rows is None or rows.input_scale is None or not multiplies_int8 or rows.rows.zero_points is not None:
                return rows
            channels = Int8Rows(signed_codes(rows.rows, bits=8), np.ascontiguousarray(rows.rows.scales[:, 0]))
            return Int8Layer(rows.input_scale, None, lambda: channels)

        return BlockLayer(load)

    return {linear.site: layer(linear) for linear in config.linears if linear.is_quantizable}
