"""Blocks of small integers: exact where they can be, within half a step elsewhere, and as the runtime reads them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.storage.blocks import check_divisible, dequantize_rows, quantize_rows
from runtime.errors import UnsupportedModel


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, True), (4, True), (4, False)]), st.sampled_from([16, 32]))
def test_error_is_within_half_a_step_of_the_block(seed: int, scheme: tuple[int, bool], block_size: int) -> None:
    bits, symmetric = scheme
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((5, 3 * block_size)) * 10.0 ** rng.integers(-3, 3, (5, 1))).astype(np.float32)
    rows = quantize_rows(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    error = np.abs(dequantize_rows(rows, bits=bits) - weight).reshape(5, 3, block_size)
    if symmetric:
        assert np.all(error <= rows.scales[..., None] * 0.5001)
    else:
        # The range may be shrunk by up to a fifth, which clips the ends; it is chosen only where that costs less.
        full = quantize_without_shrinking(weight, bits, block_size)
        assert np.all((error**2).sum(-1) <= full * 1.0001 + 1e-12)


def quantize_without_shrinking(weight: np.ndarray, bits: int, block_size: int) -> np.ndarray:
    """Squared error of each block under the plain asymmetric scheme, written out a block at a time."""
    top = 2**bits - 1
    out = np.zeros((len(weight), weight.shape[1] // block_size))
    for n, k in np.ndindex(*out.shape):
        block = weight[n, k * block_size : (k + 1) * block_size]
        low, high = min(block.min(), 0), max(block.max(), 0)
        scale = np.float32((high - low) / top) or np.float32(1)
        zero = np.clip(np.rint(-low / scale), 0, top)
        values = np.clip(np.rint(block / scale) + zero, 0, top)
        out[n, k] = (((values - zero) * scale - block) ** 2).sum()
    return out


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_zeros_stay_zero(bits: int, symmetric: bool) -> None:
    rows = quantize_rows(np.zeros((2, 64), np.float32), bits=bits, block_size=32, symmetric=symmetric)
    assert not dequantize_rows(rows, bits=bits).any()


def test_values_on_the_grid_are_exact() -> None:
    grid = (np.arange(-127, 128, 8, dtype=np.float32) * 0.5)[None, :32]
    rows = quantize_rows(grid, bits=8, block_size=32, symmetric=True)
    np.testing.assert_array_equal(dequantize_rows(rows, bits=8), grid)


def test_a_row_that_blocks_do_not_fill_is_refused_with_a_way_out() -> None:
    check_divisible("w", 64, 32)
    with pytest.raises(UnsupportedModel, match=r"rows of 65.*fp32"):
        check_divisible("w", 65, 32)
