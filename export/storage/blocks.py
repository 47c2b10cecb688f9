"""Weights as blocks of small integers: round to nearest, per block of one output row.

Layout of ONNX Runtime's MatMulNBits: values uint8 `[N, K/block, block*bits/8]` (4-bit: the first of a pair in the low
half), scales float `[N, K/block]`, zero points uint8 `[N, ceil(K/block*bits/8)]`, packed the same way;
without zero points the middle, 2^(bits-1), stands for 0.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UnsupportedModel

# Clip ratios to try for a block: clipping the ends a little often costs less than coarser steps.
_SHRINK = np.linspace(1.0, 0.80, 9, dtype=np.float32)


class QuantizedRows(NamedTuple):
    """Some rows of a weight matrix, quantized. `zero_points` is None for a symmetric scheme."""

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def check_divisible(name: str, size: int, block_size: int) -> None:
    """UnsupportedModel unless whole blocks fill the row."""
    if size % block_size:
        raise UnsupportedModel(
            f"{name} has rows of {size}, not a multiple of the quantization block {block_size}; "
            "use PRECISION=fp32 or fp16"
        )


def quantize_rows(weight: NDArray[np.float32], *, bits: int, block_size: int, symmetric: bool) -> QuantizedRows:
    """Quantize float32 `[N, K]` with K a multiple of block_size; bits is 4 or 8."""
    n, k = weight.shape
    blocks = weight.reshape(n, k // block_size, block_size)
    top = (1 << bits) - 1
    if symmetric:
        middle = 1 << (bits - 1)
        scales = np.abs(blocks).max(-1) / (middle - 1)
        values = np.rint(blocks / _no_zero(scales)[..., None]) + middle
        return QuantizedRows(pack(values, bits), scales.astype(np.float32), None)
    scales, zeros = best_range(blocks, top)
    values = np.clip(np.rint(blocks / _no_zero(scales)[..., None]) + zeros[..., None], 0, top)
    return QuantizedRows(pack(values, bits), scales, pack(zeros, bits))


def best_range(
    blocks: NDArray[np.float32], top: int, importance: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point of each block with the least squared error among the shrunk ranges.

    blocks: float32 `[..., block]`; importance: weight of each squared error, broadcast to blocks
    """
    counts = np.float32(1) if importance is None else importance
    high = np.maximum(blocks.max(-1), 0)
    low = np.minimum(blocks.min(-1), 0)
    best_error = np.full(high.shape, np.inf, np.float32)
    best_scale, best_zero = np.zeros_like(high), np.zeros_like(high)
    for shrink in _SHRINK:
        scale = _no_zero((high - low) * shrink / top)
        zero = np.clip(np.rint(-low * shrink / scale), 0, top)
        values = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
        error = (np.square((values - zero[..., None]) * scale[..., None] - blocks) * counts).sum(-1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
    return best_scale.astype(np.float32), best_zero.astype(np.float32)


def _no_zero(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """A block of zeros has scale 0; dividing by 1 keeps its values at zero."""
    return np.where(scales == 0, np.float32(1), scales)


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Narrow to uint8; 4-bit values two to a byte along the last axis, the first in the low half."""
    small = values.astype(np.uint8)
    if bits == 8:
        return small
    if small.shape[-1] % 2:
        small = np.concatenate([small, np.zeros((*small.shape[:-1], 1), np.uint8)], -1)
    return np.asarray(small[..., 0::2] | (small[..., 1::2] << 4), np.uint8)


def dequantize_rows(rows: QuantizedRows, *, bits: int) -> NDArray[np.float32]:
    """The float32 `[N, K]` that the runtime computes with."""
    values, zeros = rows.values, rows.zero_points
    n, num_blocks = rows.scales.shape
    middle = np.float32(1 << (bits - 1))
    offsets = middle if zeros is None else unpack(zeros, bits).astype(np.float32)[:, :num_blocks, None]
    return ((unpack(values, bits).astype(np.float32) - offsets) * rows.scales[..., None]).reshape(n, -1)


def signed_codes(rows: QuantizedRows, *, bits: int) -> NDArray[np.int8]:
    """int8 `[N, K]` of a symmetric matrix: 0 stands for 0."""
    assert rows.zero_points is None, "an asymmetric matrix"
    n = len(rows.values)
    # Modulo 256, so that 8-bit values need no wider type on the way.
    return (unpack(rows.values, bits) - np.uint8(1 << (bits - 1))).astype(np.int8).reshape(n, -1)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`, except that padding stays."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
