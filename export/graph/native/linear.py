"""Quantized linear layers of the `native` dialect: one operator each, with the initializers of the `ort` dialect.

The operators quantize their input, and repack weights when a session is made: runtime/native/linear/.
"""

import onnx_ir as ir

from export.graph.builder import NATIVE, GraphBuilder
from export.graph.ort.int8_linear import int8_weights
from export.graph.ort.linear import QuantizedWeight
from export.graph.weights import Weight
from export.quantize.rounding.layers import Int8Layer
from export.schemes.forms import Blocks


def block_linear(
    g: GraphBuilder, x: ir.Value, stored: QuantizedWeight, shape: tuple[int, int], blocks: Blocks, name: str
) -> ir.Value:
    """x `[..., K]` times a matrix in blocks; each block of each row of x gets an int8 scale of its own."""
    inputs = [x, stored.values, stored.scales] + ([stored.zero_points] if stored.zero_points else [])
    attributes = {"N": shape[0], "K": shape[1], "bits": blocks.bits, "block_size": blocks.block_size}
    return g.op("BlockLinear", inputs, name, domain=NATIVE, **attributes)


def int8_linear(g: GraphBuilder, x: ir.Value, weight: Weight, layer: Int8Layer, name: str) -> ir.Value:
    """x float32 `[..., K]` times weight transposed, with calibrated scales of x: one pass over x, or two."""
    scales = {"scale": float(layer.scale)}
    if layer.fine_scale is not None:
        scales["fine_scale"] = float(layer.fine_scale)
    return g.op("Int8Linear", [x, *int8_weights(g, weight, layer)], name, domain=NATIVE, **scales)
