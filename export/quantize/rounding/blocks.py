"""Round weights to int4 or int8 in blocks that share a scale, to nearest or with GPTQ.

Each block's scale and zero point are chosen first, by its weights' squared errors, weighted by the energy of their
inputs; gptq.py then rounds the columns. Symmetric blocks are TensorRT's: codes from -8 to 7, no zero point, and scales
that half precision can represent.
"""

import numpy as np
from numpy.typing import NDArray

from export.quantize.rounding.gptq import GramMatrix, Grid, factorized, rounded_codes
from export.quantize.statistics.parallel import in_order, slices_of
from export.schemes.forms import Blocks
from export.storage.blocks import QuantizedRows, best_range, pack

Array = NDArray[np.float32]

SHRINKAGE = 0.1
"""Reduces correlations between inputs, see `factorized`. A low value is better for massive activations, a high one for
few tokens: with 1,500 tokens, 0.03, 0.1, 0.3 and 0.5 give KL 0.0019, 0.0026, 0.0051, 0.0099 nats in SmolLM2-135M's
layer 11 (down) and 0.0013, 0.0011, 0.0011, 0.0011 in layer 5 (gate_up). An export uses 12,000 tokens."""

SMALLEST_SCALE = np.float32(np.finfo(np.float16).tiny)
"""The smallest normal half-precision number. A smaller scale loses digits, and a scale of 0 is divided by."""

# Weights whose grid is searched at once: the search makes some copies, which should fit the cache.
_WEIGHTS_AT_ONCE = 1 << 17

# Clip ratios tried for a symmetric block: clipping one value a little often costs less than a coarser step for all.
_CLIP_RATIOS = np.linspace(0.75, 1.0, 11, dtype=np.float32)


def block_grid(weight: Array, blocks: Blocks, importance: Array | None = None) -> Grid:
    """Choose the grid of float32 `[N, K]`; importance `[K]` weights the squared errors of each input's weights."""
    some_rows = slices_of(len(weight), max(1, _WEIGHTS_AT_ONCE // weight.shape[1]))
    parts = list(in_order(lambda some: _grid_of_rows(weight[some], blocks, importance), some_rows))
    scales, lowest, highest = (np.concatenate([part[idx] for part in parts], axis=1) for idx in range(3))
    return Grid(scales, lowest, highest, blocks.block_size)


def _grid_of_rows(weight: Array, blocks: Blocks, importance: Array | None) -> tuple[Array, Array, Array]:
    """Scales, lowest and highest codes of some rows, `[groups, n]` each."""
    n, k = weight.shape
    top = (1 << blocks.bits) - 1
    counts = None if importance is None else importance.reshape(-1, blocks.block_size)
    grouped = weight.reshape(n, k // blocks.block_size, blocks.block_size)
    if blocks.symmetric:
        scales = symmetric_scales(grouped, blocks.bits, counts).T
        middle = np.float32(1 << (blocks.bits - 1))
        return scales, np.full_like(scales, -middle), np.full_like(scales, middle - 1)
    scales, zeros = best_range(grouped, top, counts)
    # A block of zeros gets the scale 0, which cannot be divided by. With 1 it stays zero.
    scales = np.where(scales == 0, np.float32(1), scales)
    return scales.T, -zeros.T, top - zeros.T


def symmetric_scales(blocks: Array, bits: int, importance: Array | None = None) -> Array:
    """Half-precision scales with the least squared error for `[..., block]`.

    Each clip ratio is tried with the largest magnitude at the highest code and at the lowest.
    """
    middle = 1 << (bits - 1)
    counts = np.float32(1) if importance is None else importance
    highest = np.abs(blocks).max(-1)
    best_error, best = np.full(highest.shape, np.inf, np.float32), np.zeros_like(highest)
    for clip_ratio in _CLIP_RATIOS:
        for steps in (middle - 1, middle):
            scale = np.maximum(highest * clip_ratio / steps, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
            codes = np.clip(np.rint(blocks / scale[..., None]), -middle, middle - 1)
            error = (np.square(codes * scale[..., None] - blocks) * counts).sum(-1)
            is_better = error < best_error
            best_error, best = np.where(is_better, error, best_error), np.where(is_better, scale, best)
    return np.asarray(best, np.float32)


def packed_rows(codes: NDArray[np.int8], grid: Grid, blocks: Blocks) -> QuantizedRows:
    """Pack codes `[N, K]` in the layout of MatMulNBits."""
    n, k = codes.shape
    zeros = -grid.lowest.T
    values = codes.reshape(n, k // blocks.block_size, blocks.block_size) + zeros[..., None]
    scales = np.ascontiguousarray(grid.scales.T)
    return QuantizedRows(pack(values, blocks.bits), scales, None if blocks.symmetric else pack(zeros, blocks.bits))


def nearest_rows(weight: Array, blocks: Blocks) -> QuantizedRows:
    """Round float32 `[N, K]` to nearest."""
    grid = block_grid(weight, blocks)
    return packed_rows(grid.codes(weight), grid, blocks)


def gptq_blocks(weight: Array, gram: GramMatrix, blocks: Blocks, lost: Array | None = None) -> QuantizedRows:
    """Round float32 `[N, K]` with GPTQ. `gram` is overwritten; lost: `drift` of the inputs, to be corrected."""
    importance = np.diagonal(gram.sums).copy()
    factor = factorized(gram, shrinkage=SHRINKAGE, act_order=True)
    if factor is None:
        return nearest_rows(weight, blocks)
    # The real-valued weight whose product with the rounded input is nearest to the exact product (least squares).
    target = weight if lost is None else weight + factor.solved(lost)
    grid = block_grid(target, blocks, importance)
    return packed_rows(rounded_codes(target, factor, grid), grid, blocks)
