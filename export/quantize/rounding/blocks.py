"""Weights in blocks of small integers, rounded together rather than each alone: int4 that is worth having.

Each block's grid (scale, zero point) is chosen first, by the squared errors of its weights, each counted by the energy
of its input; error_compensation.py then rounds the columns against the calibration text's inputs. Symmetric blocks are
TensorRT's: codes from -8 to 7, no zero point, and scales that half precision holds.
"""

import numpy as np
from numpy.typing import NDArray

from export.quantize.rounding.gptq import Grid, Moments, problem_of, rounded_codes
from export.schemes.forms import Blocks
from export.storage.blocks import QuantizedRows, best_range, pack

Array = NDArray[np.float32]

SHRINKAGE = 0.1
"""Of correlations between inputs, see problem_of. Less follows the few directions of massive activations better, more
does where tokens are few: on 1,500 tokens 0.03, 0.1, 0.3 and 0.5 leave SmolLM2-135M's layer 11 (down) with 0.0019,
0.0026, 0.0051, 0.0099 nats and layer 5 (gate_up) with 0.0013, 0.0011, 0.0011, 0.0011; a rounding has 12,000."""


SMALLEST_SCALE = np.float32(np.finfo(np.float16).tiny)
"""Of the normal half-precision numbers: below it a scale loses digits, and at 0 a block of zeros divides by it."""

# Candidates for the end of a symmetric block's range, as shares of its largest magnitude: clipping one value a little
# often costs less than coarser steps for the others.
_SHRINK = np.linspace(0.75, 1.0, 11, dtype=np.float32)


def block_grid(weight: Array, blocks: Blocks, importance: Array | None = None) -> Grid:
    """The grid of float32 `[N, K]`; importance `[K]`: what an input's squared error counts."""
    n, k = weight.shape
    top = (1 << blocks.bits) - 1
    counts = None if importance is None else importance.reshape(-1, blocks.block_size)
    grouped = weight.reshape(n, k // blocks.block_size, blocks.block_size)
    if blocks.symmetric:
        scales = np.ascontiguousarray(symmetric_scales(grouped, blocks.bits, counts).T)
        middle = np.float32(1 << (blocks.bits - 1))
        return Grid(scales, np.full_like(scales, -middle), np.full_like(scales, middle - 1), blocks.block_size)
    scales, zeros = best_range(grouped, top, counts)
    # A block of zeros has the scale 0 and whatever codes: any other scale leaves it at zero and can be divided by.
    scales = np.where(scales == 0, np.float32(1), scales)
    return Grid(np.ascontiguousarray(scales.T), -zeros.T, top - zeros.T, blocks.block_size)


def symmetric_scales(blocks: Array, bits: int, importance: Array | None = None) -> Array:
    """Scales, half-precision numbers, with the least squared error for `[..., block]`; its largest magnitude becomes
    either end of the codes, and is clipped at the upper one where coarser steps for the others would cost more.
    """
    middle = 1 << (bits - 1)
    counts = np.float32(1) if importance is None else importance
    highest = np.abs(blocks).max(-1)
    best_error, best = np.full(highest.shape, np.inf, np.float32), np.zeros_like(highest)
    for shrink in _SHRINK:
        for steps in (middle - 1, middle):
            scale = np.maximum(highest * shrink / steps, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
            codes = np.clip(np.rint(blocks / scale[..., None]), -middle, middle - 1)
            error = (np.square(codes * scale[..., None] - blocks) * counts).sum(-1)
            is_better = error < best_error
            best_error, best = np.where(is_better, error, best_error), np.where(is_better, scale, best)
    return np.asarray(best, np.float32)


def packed_rows(codes: NDArray[np.int8], grid: Grid, blocks: Blocks) -> QuantizedRows:
    """Codes `[N, K]` in the layout of MatMulNBits."""
    n, k = codes.shape
    zeros = -grid.lowest.T
    values = codes.reshape(n, k // blocks.block_size, blocks.block_size) + zeros[..., None]
    scales = np.ascontiguousarray(grid.scales.T)
    return QuantizedRows(pack(values, blocks.bits), scales, None if blocks.symmetric else pack(zeros, blocks.bits))


def nearest_rows(weight: Array, blocks: Blocks) -> QuantizedRows:
    """float32 `[N, K]`, each weight rounded for itself."""
    grid = block_grid(weight, blocks)
    return packed_rows(grid.codes(weight), grid, blocks)


def compensated_rows(weight: Array, moments: Moments, blocks: Blocks) -> QuantizedRows:
    """float32 `[N, K]` rounded so that its product with the calibrated input stays near the exact one."""
    problem = problem_of(moments, shrinkage=SHRINKAGE, heaviest_first=True)
    if problem is None:  # the input was always 0: nothing tells which weights matter
        return nearest_rows(weight, blocks)
    target = problem.target(weight)
    grid = block_grid(target, blocks, np.diagonal(moments.rounded))
    return packed_rows(rounded_codes(target, problem, grid), grid, blocks)
