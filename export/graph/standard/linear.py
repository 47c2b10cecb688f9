"""Linear layers in standard ONNX: QuantizeLinear and DequantizeLinear around a MatMul, which TensorRT fuses.

Every scheme is symmetric, without zero points. Weights are stored as `[K, N]`, the MatMul's order, so that float and
calibrated weights have the same bytes as in the `ort` dialect. Scales have the compute type, because the network is
strongly typed. Weights that are rounded here are rounded with the scale as stored, so a half-precision scale costs no
accuracy; for calibrated weights it costs a few parts in ten thousand.

A layer that the `ort` dialect runs in two int8 passes has int8 weights and float activations. Layers that int4/model.py
rounded for TensorRT keep those integers; others are rounded to nearest here.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.builder import GraphBuilder
from export.graph.types import numpy_type
from export.graph.weights import Weight
from export.model.description import Linear
from export.quantize.rounding.blocks import SMALLEST_SCALE, nearest_rows
from export.quantize.rounding.int8 import Int8Rows
from export.quantize.rounding.layers import Int8Layer, QuantizedLayers
from export.schemes.forms import Blocks, Floats, Int8Products
from export.schemes.scheme import Storage
from export.schemes.weight_only import INT4_BLOCKS, INT4_SIZES
from export.storage.blocks import QuantizedRows, check_divisible, signed_codes
from export.storage.quantized_rows import ImportedRows

_SCALE_ERROR = 2.0**-10
"""Largest relative error of a stored scale with which calibrated integers are kept: twice half precision's rounding."""


class StandardLinear:
    """Adds linear layers to one graph. An input that several layers read is quantized once."""

    def __init__(self, g: GraphBuilder, storage: Storage, layers: QuantizedLayers) -> None:
        self._g, self._storage, self._layers = g, storage, layers
        self._dtype = numpy_type(storage.compute)
        self._quantized: dict[str, ir.Value] = {}

    def __call__(self, x: ir.Value, linear: Linear, weight: Weight, name: str) -> ir.Value:
        """x `[..., K]` times weight transposed, `[..., N]`."""
        form = self._storage.form_of(linear.role)
        layer = self._layers.take(linear)
        if isinstance(layer, Int8Layer):
            matrix = self._calibrated(weight, layer.load())
            if isinstance(form, Int8Products) and layer.fine_scale is None:
                x = self._rounded(x, layer.scale)
        elif isinstance(form, Floats):
            matrix = self._g.array(weight.name, weight.load().T.astype(self._dtype))
        elif isinstance(form, Blocks):
            matrix = self._int4(weight, layer)
        else:
            matrix = self._int8(weight)
        return self._g.op("MatMul", [x, matrix], name)

    def _rounded(self, x: ir.Value, scale: float) -> ir.Value:
        """Fake-quantize x to int8."""
        key = f"{x.name}.int8"
        if key not in self._quantized:
            g, zero = self._g, self._g.constant("zero_point", np.array(0, np.int8))
            stored = g.constant(f"{x.name}.scale", self._stored_scales(np.array(scale, np.float32)))
            small = g.op("QuantizeLinear", [x, stored, zero], key)
            self._quantized[key] = g.op("DequantizeLinear", [small, stored, zero], f"{x.name}.rounded")
        return self._quantized[key]

    def _calibrated(self, weight: Weight, rows: Int8Rows) -> ir.Value:
        """The `ort` dialect's integers, or new ones if half precision cannot represent their scales."""
        assert rows.values.shape == weight.shape, (weight.name, rows.values.shape, weight.shape)
        scales, values = self._stored_scales(rows.scales), np.ascontiguousarray(rows.values.T)
        if not self._can_store(rows.scales):
            values = _rounded_with(rows.dequantized().T, scales)
        return self._dequantized(weight, values, scales)

    def _int8(self, weight: Weight) -> ir.Value:
        """Round the weights to int8 with one scale per output channel."""
        matrix = weight.load().T  # [K, N]
        scales = self._stored_scales(np.abs(matrix).max(0) / 127)
        return self._dequantized(weight, _rounded_with(matrix, scales), scales)

    def _dequantized(self, weight: Weight, values: NDArray[np.int8], scales: NDArray[Any]) -> ir.Value:
        """Dequantize int8 `[K, N]` with one scale per column."""
        inputs = [self._g.array(f"{weight.name}.int8", values), self._g.array(f"{weight.name}.int8.scales", scales)]
        return self._g.op("DequantizeLinear", inputs, f"{weight.name}.wide", axis=1)

    def _int4(self, weight: Weight, imported: ImportedRows | None) -> ir.Value:
        """Use the layer's integers if TensorRT supports them, or round the weights to nearest."""
        if imported is not None and imported.blocks.symmetric and imported.input_order is None:
            rows, blocks = imported.rows, imported.blocks
            if blocks.bits == 8 and blocks.block_size == weight.shape[1]:
                return self._calibrated(weight, Int8Rows(signed_codes(rows, bits=8), rows.scales[:, 0]))
            if blocks.bits == 4 and blocks.block_size in INT4_SIZES and self._can_store(rows.scales):
                return self._int4_blocks(weight, rows, blocks)
        check_divisible(weight.name, weight.shape[1], INT4_BLOCKS.block_size)
        return self._int4_blocks(weight, nearest_rows(weight.load(), INT4_BLOCKS), INT4_BLOCKS)

    def _int4_blocks(self, weight: Weight, rows: QuantizedRows, blocks: Blocks) -> ir.Value:
        """Dequantize int4 with one scale per block of inputs of an output channel."""
        n, k = weight.shape
        packed = _pack_int4(np.ascontiguousarray(signed_codes(rows, bits=4).T))
        stored = self._g.weight(f"{weight.name}.int4", self._g.write([packed]), ir.DataType.INT4, (k, n))
        scales = np.ascontiguousarray(self._stored_scales(rows.scales).T)
        inputs = [stored, self._g.array(f"{weight.name}.int4.scales", scales)]
        return self._g.op("DequantizeLinear", inputs, f"{weight.name}.wide", axis=0, block_size=blocks.block_size)

    def _stored_scales(self, scales: NDArray[np.float32]) -> NDArray[Any]:
        """Scales in the compute type, never 0."""
        return np.maximum(scales, SMALLEST_SCALE).astype(self._dtype)

    def _can_store(self, scales: NDArray[np.float32]) -> bool:
        """Whether the compute type represents the scales within _SCALE_ERROR."""
        stored = self._stored_scales(scales).astype(np.float32)
        return bool((np.abs(stored - scales) <= _SCALE_ERROR * scales).all())


def _rounded_with(matrix: NDArray[np.float32], scales: NDArray[Any]) -> NDArray[np.int8]:
    """Round `[K, N]` to the nearest multiples of each column's scale, -127 to 127."""
    return np.clip(np.rint(matrix / scales.astype(np.float32)), -127, 127).astype(np.int8)


def _pack_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack two values into a byte, in row-major order and the first in the low half, as ONNX stores INT4."""
    pairs = (values & 15).astype(np.uint8).reshape(-1, 2)
    return np.asarray(pairs[:, 0] | (pairs[:, 1] << 4), np.uint8)
