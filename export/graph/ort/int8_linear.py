"""Linear layers with int8 weights and int8 activations, in the `ort` dialect: static scales, one kernel.

    x -> QuantizeLinear (uint8, zero point 128) -> MatMulIntegerToFloat (int32 sums, then two scales) -> y

ONNX Runtime fuses DequantizeLinear + MatMul into these operators; they are written directly so that nothing depends on
the fusion. VNNI multiplies uint8 by int8; int8 by int8 is slow (8 tokens/s instead of 131). Integer sums are exact, so
a row's result does not depend on its batch.

A layer in two passes also multiplies the first pass's rounding error, with a scale 254 times finer, by the same
weights. Both are rows of one product, so that the weights are read once: decoding, which is bound by reading them,
hardly slows down. Time for 512 rows of 1536 -> 576, AVX512-VNNI: one pass 2.0 ms, two 2.9, float 3.7, MatMulNBits
8 bits 4.4, a block Hadamard transform before one pass 3.4.

Weights are int8 `[K, N]` with zero point 0 and one float32 scale per column: the standard dialects read the same bytes.
"""

import numpy as np
import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.weights import Weight
from export.quantize.rounding.layers import Int8Layer


def int8_weights(g: GraphBuilder, weight: Weight, layer: Int8Layer) -> tuple[ir.Value, ir.Value]:
    """The initializers: int8 `[K, N]`, and a float32 scale for each column."""
    rows = layer.load()
    assert rows.values.shape == weight.shape, (weight.name, rows.values.shape, weight.shape)
    values = g.array(f"{weight.name}.int8", np.ascontiguousarray(rows.values.T))
    return values, g.array(f"{weight.name}.int8.scales", rows.scales)


def int8_linear(g: GraphBuilder, x: ir.Value, weight: Weight, layer: Int8Layer, name: str) -> ir.Value:
    """x float32 `[..., K]` times weight transposed, float32 `[..., N]`."""
    values, scales = int8_weights(g, weight, layer)
    zero = g.constant("int8.zero", np.array(128, np.uint8))
    weight_zero = g.constant(f"{weight.name}.int8.zero", np.zeros(weight.shape[0], np.int8))

    scale = g.constant(f"{name}.scale", np.array(layer.scale, np.float32))
    small = g.op("QuantizeLinear", [x, scale, zero], f"{name}.input")

    def product(rows: ir.Value, row_scale: ir.Value, out: str) -> ir.Value:
        inputs = [rows, values, row_scale, scales, zero, weight_zero]
        return g.op("MatMulIntegerToFloat", inputs, out, domain=MICROSOFT)

    if layer.fine_scale is None:
        return product(small, scale, name)
    fine_scale = g.constant(f"{name}.fine.scale", np.array(layer.fine_scale, np.float32))
    ratio = g.constant(f"{name}.ratio", np.array(np.float32(layer.scale) / np.float32(layer.fine_scale), np.float32))
    left = g.op("Sub", [x, g.op("DequantizeLinear", [small, scale, zero], f"{name}.seen")], f"{name}.left")
    small_left = g.op("QuantizeLinear", [left, fine_scale, zero], f"{name}.left.input")
    both = product(g.op("Concat", [small, small_left], f"{name}.both.input", axis=0), fine_scale, f"{name}.both")
    coarse, fine = g.ops("Split", [both], [f"{name}.coarse", f"{name}.fine"], axis=0, num_outputs=2)
    return g.op("Add", [g.op("Mul", [coarse, ratio], f"{name}.coarse.scaled"), fine], name)
