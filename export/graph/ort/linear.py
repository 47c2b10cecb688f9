"""Linear layers, embeddings and tied LM heads of the `ort` dialect, as floats or as blocks of integers.

Knows nothing about decoders.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.artifact.weight_file import Extent
from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.weights import Weight
from export.schemes.forms import Blocks
from export.schemes.scheme import Storage
from export.storage.blocks import QuantizedRows, check_divisible, quantize_rows
from export.storage.quantized_rows import ImportedRows

# Weights quantized at once: the search for the best range holds a dozen float32 copies, 50 MB.
_WEIGHTS_AT_ONCE = 1 << 20

# MatMulNBits with int8 products and int32 sums; activations are quantized per block and row at run time.
_INT8_PRODUCTS = 4


class QuantizedWeight(NamedTuple):
    """The initializers of a block-quantized matrix, and the place of its values in the weight file."""

    extent: Extent
    values: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


BlockProduct = Callable[[GraphBuilder, ir.Value, QuantizedWeight, tuple[int, int], Blocks, str], ir.Value]
"""x `[..., K]` times a block-quantized matrix of shape `[N, K]` transposed: the operator is the dialect's own."""


def float_or_block_linear(
    g: GraphBuilder, x: ir.Value, weight: Weight, storage: Storage, name: str, multiply: BlockProduct
) -> ir.Value:
    """x `[..., K]` times weight transposed, `[..., N]`."""
    blocks = storage.fallback_of(weight.role)
    if not isinstance(blocks, Blocks):
        matrix = weight.load().T.astype(storage.compute)
        return g.op("MatMul", [x, g.array(weight.name, matrix)], name)
    stored = _write_blocks(g, weight, blocks)
    return multiply(g, x, stored, weight.shape, blocks, name)


def embedding(g: GraphBuilder, ids: ir.Value, weight: Weight, storage: Storage, name: str) -> tuple[ir.Value, Any]:
    """Rows of the embedding for int64 ids; also the initializers that a tied LM head shares."""
    blocks = storage.embedding
    if not isinstance(blocks, Blocks):
        table = g.array(weight.name, weight.load().astype(storage.compute, copy=False))
        return g.op("Gather", [table, ids], name), table
    stored = _write_blocks(g, weight, blocks)
    # GatherBlockQuantized needs two dimensions: a second initializer for the same bytes.
    rows, row_bytes = weight.shape[0], weight.shape[1] * blocks.bits // 8
    flat = g.weight(f"{weight.name}.rows", stored.extent, ir.DataType.UINT8, (rows, row_bytes))
    inputs = [flat, ids, stored.scales] + ([stored.zero_points] if stored.zero_points else [])
    x = g.op(
        "GatherBlockQuantized",
        inputs,
        name,
        domain=MICROSOFT,
        bits=blocks.bits,
        block_size=blocks.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    return x, stored


def tied_lm_head(
    g: GraphBuilder, x: ir.Value, weight: Weight, shared: Any, storage: Storage, name: str, multiply: BlockProduct
) -> ir.Value:
    """Logits of x `[R, K]` with the embedding's weights; `shared` comes from `embedding`."""
    blocks = storage.embedding
    if not isinstance(blocks, Blocks):
        return g.op("Gemm", [x, shared], name, transB=1)
    return multiply(g, x, shared, weight.shape, blocks, name)


def imported_linear(
    g: GraphBuilder, x: ir.Value, weight: Weight, imported: ImportedRows, name: str, multiply: BlockProduct
) -> ir.Value:
    """x times a matrix that is quantized already; x is reordered first if GPTQ's act-order stored its columns so."""
    rows, blocks, order, _ = imported
    if order is not None:
        x = g.op("Gather", [x, g.array(f"{weight.name}.input_order", order)], f"{name}.ordered", axis=-1)
    extent = g.write([rows.values])
    values = g.weight(f"{weight.name}.q{blocks.bits}", extent, ir.DataType.UINT8, rows.values.shape)
    scales = g.array(f"{weight.name}.scales", rows.scales)
    zero_points = None if rows.zero_points is None else g.array(f"{weight.name}.zero_points", rows.zero_points)
    return multiply(g, x, QuantizedWeight(extent, values, scales, zero_points), weight.shape, blocks, name)


def _write_blocks(g: GraphBuilder, weight: Weight, blocks: Blocks) -> QuantizedWeight:
    n, k = weight.shape
    check_divisible(weight.name, k, blocks.block_size)
    matrix = weight.load()
    rest: list[QuantizedRows] = []

    def values() -> Iterator[NDArray[np.uint8]]:
        step = max(1, _WEIGHTS_AT_ONCE // k)
        for start in range(0, n, step):
            rows = quantize_rows(
                matrix[start : start + step],
                bits=blocks.bits,
                block_size=blocks.block_size,
                symmetric=blocks.symmetric,
            )
            rest.append(rows._replace(values=rows.values[:0]))
            yield rows.values

    num_blocks = k // blocks.block_size
    shape = (n, num_blocks, blocks.block_size * blocks.bits // 8)
    extent = g.write(values())
    stored = g.weight(f"{weight.name}.q{blocks.bits}", extent, ir.DataType.UINT8, shape)
    scales = g.array(f"{weight.name}.scales", np.concatenate([rows.scales for rows in rest]))
    zero_points = None
    if not blocks.symmetric:
        packed = np.concatenate([rows.zero_points for rows in rest if rows.zero_points is not None])
        zero_points = g.array(f"{weight.name}.zero_points", packed)
    return QuantizedWeight(extent, stored, scales, zero_points)


def matmul_nbits(
    g: GraphBuilder, x: ir.Value, stored: QuantizedWeight, shape: tuple[int, int], blocks: Blocks, name: str
) -> ir.Value:
    """The product in ONNX Runtime's operator."""
    inputs = [x, stored.values, stored.scales] + ([stored.zero_points] if stored.zero_points else [])
    return g.op(
        "MatMulNBits",
        inputs,
        name,
        domain=MICROSOFT,
        N=shape[0],
        K=shape[1],
        bits=blocks.bits,
        block_size=blocks.block_size,
        accuracy_level=_INT8_PRODUCTS,
    )
