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

GROUP_SIZE = 128
"""Inputs that share a scale where one calibrated scale is too coarse.

w8a8 of SmolLM2-135M, KL to float32 on two texts that nobody calibrated on (3,000 tokens each), and the time of a prompt
of 512 tokens and of a step of 32 rows, as shares of two passes:

    two passes     0.0052  0.0048
    groups of 64   0.0060  0.0053   0.90   0.93
    128            0.0062  0.0057   0.89   0.92
    256            0.0063  0.0062   0.88   0.92
    the whole row  0.0089  0.0087   0.88   0.86
"""


def block_linear(
    g: GraphBuilder, x: ir.Value, stored: QuantizedWeight, shape: tuple[int, int], blocks: Blocks, name: str
) -> ir.Value:
    """x `[..., K]` times a matrix in blocks; each block of each row of x gets an int8 scale of its own."""
    inputs = [x, stored.values, stored.scales] + ([stored.zero_points] if stored.zero_points else [])
    attributes = {"N": shape[0], "K": shape[1], "bits": blocks.bits, "block_size": blocks.block_size}
    return g.op("BlockLinear", inputs, name, domain=NATIVE, **attributes)


def int8_linear(g: GraphBuilder, x: ir.Value, weight: Weight, layer: Int8Layer, name: str) -> ir.Value:
    """x float32 `[..., K]` times weight transposed. x has a calibrated scale, or each group of a row one of its own.

    The latter takes the place of the second pass that other dialects need.
    """
    scaled = {"scale": float(layer.scale)} if layer.fine_scale is None else {"group_size": GROUP_SIZE}
    return g.op("ChannelLinear", [x, *int8_weights(g, weight, layer)], name, domain=NATIVE, **scaled)
