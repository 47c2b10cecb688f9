"""Repacks weights that are quantized already into the layout of MatMulNBits, without rounding.

A group that is longer than the kernel's longest block becomes several blocks with the same scale. Inputs that were
quantized out of order are put in the groups' order. Knows neither checkpoints nor graphs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.schemes.forms import Blocks
from export.storage.blocks import QuantizedRows, dequantize_rows, pack
from runtime.errors import UnsupportedModel

# MatMulNBits takes powers of two from 16 to 256. Activations are rounded to 8 bits per block, so not the largest.
_BLOCK_SIZES = (128, 64, 32, 16)

# Dequantized at once: scales are spread out to a float each, which for a whole matrix would be as large again.
_ROWS_AT_ONCE = 256


class Codes(NamedTuple):
    """A quantized matrix as its tool stored it: `(values - zeros) * scales`, group by group.

    values uint8 `[N, K]`, zeros uint8 and scales float32 `[N, groups]`; input k belongs to the group `group_of[k]`.
    """

    values: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[np.float32]
    group_of: NDArray[np.int64]

    def dequantized(self) -> NDArray[np.float32]:
        """float32 `[N, K]`; exact, because a scale has at most 16 significant bits and the difference at most 9."""
        matrix = np.empty(self.values.shape, np.float32)
        for start in range(0, len(matrix), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            np.subtract(self.values[some], self.zeros[some][:, self.group_of], out=matrix[some], dtype=np.float32)
            matrix[some] *= self.scales[some][:, self.group_of]
        return matrix


class ImportedRows(NamedTuple):
    """A matrix for MatMulNBits.

    input_order: the input of each column; None if they are in order
    input_scale: of inputs in int8, where a tool chose one; None for float inputs
    """

    rows: QuantizedRows
    blocks: Blocks
    input_order: NDArray[np.int64] | None
    input_scale: float | None = None

    def dequantized(self) -> NDArray[np.float32]:
        """float32 `[N, K]` in the inputs' own order, as the artifact computes with it."""
        matrix = dequantize_rows(self.rows, bits=self.blocks.bits)
        if self.input_order is None:
            return matrix
        restored = np.empty_like(matrix)
        restored[:, self.input_order] = matrix
        return restored

    def between(self, start: int, stop: int) -> "ImportedRows":
        """Outputs `start` to `stop` of the matrix."""
        values, scales, zeros = self.rows
        some = QuantizedRows(values[start:stop], scales[start:stop], None if zeros is None else zeros[start:stop])
        return self._replace(rows=some)


def to_blocks(codes: Codes, *, bits: int, name: str) -> ImportedRows:
    """Repack one matrix. UnsupportedModel, naming it, if its groups do not fit any block of the kernel."""
    n, k = codes.values.shape
    sizes = np.bincount(codes.group_of, minlength=codes.scales.shape[1])
    group_size = int(sizes.max())
    block_size = next((size for size in _BLOCK_SIZES if k % size == 0 and not (sizes % size).any()), None)
    if block_size is None:
        raise UnsupportedModel(
            f"{name} has rows of {k} in groups of {group_size}: no block of "
            f"{', '.join(map(str, _BLOCK_SIZES))} divides both; only --precision fp32 and fp16 can hold it"
        )
    order = np.argsort(codes.group_of, kind="stable")
    is_sorted = bool((order == np.arange(k)).all())
    values = codes.values if is_sorted else codes.values[:, order]
    group_of_block = codes.group_of[order[::block_size]]
    zeros = codes.zeros[:, group_of_block]
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    packed = QuantizedRows(
        pack(values.reshape(n, -1, block_size), bits),
        np.ascontiguousarray(codes.scales[:, group_of_block]),
        None if symmetric else pack(zeros, bits),
    )
    return ImportedRows(packed, Blocks(bits, block_size, symmetric), None if is_sorted else order)


def stacked(parts: Sequence[ImportedRows]) -> ImportedRows | None:
    """Matrices of the same input as one, `[sum of N, K]`; None if their blocks or the order of their inputs differ.

    It has an input scale if all have the same one.
    """
    first, *others = parts
    for other in others:
        if (other.blocks.bits, other.blocks.block_size) != (first.blocks.bits, first.blocks.block_size):
            return None
        if not np.array_equal(_order_of(other), _order_of(first)):
            return None
    symmetric = all(part.blocks.symmetric for part in parts)
    rows = QuantizedRows(
        np.concatenate([part.rows.values for part in parts]),
        np.concatenate([part.rows.scales for part in parts]),
        None if symmetric else np.concatenate([_zero_points(part) for part in parts]),
    )
    input_scale = first.input_scale if len({part.input_scale for part in parts}) == 1 else None
    return ImportedRows(rows, replace(first.blocks, symmetric=symmetric), first.input_order, input_scale)


def _order_of(part: ImportedRows) -> NDArray[np.int64]:
    k = part.rows.scales.shape[1] * part.blocks.block_size
    return np.arange(k) if part.input_order is None else part.input_order


def _zero_points(part: ImportedRows) -> NDArray[np.uint8]:
    if part.rows.zero_points is not None:
        return part.rows.zero_points
    return pack(np.full(part.rows.scales.shape, 1 << (part.blocks.bits - 1), np.uint8), part.blocks.bits)
