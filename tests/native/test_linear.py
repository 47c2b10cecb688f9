"""Quantized products against exact integers and float64, and the same bits for a row whatever runs beside it."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from export.storage.blocks import QuantizedRows, pack, quantize_rows
from tests.support.native.linear import PackedWeights, block_product, pack_blocks, pack_channels, quantized_inputs

# One output, a panel less one, a panel and one, whole pairs of panels, and what is neither.
OUTPUTS = [1, 15, 17, 32, 100]


def floats(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_blocks(n: int, k: int, *, bits: int, block: int, has_zeros: bool) -> QuantizedRows:
    """Blocks with every value that there is, and every zero point."""
    random = np.random.default_rng(n + k)
    num_blocks, top = -(-k // block), 1 << bits
    values = random.integers(0, top, (n, num_blocks, block))
    values[..., :2] = 0, top - 1
    zeros = pack(random.integers(0, top, (n, num_blocks)), bits) if has_zeros else None
    scales = random.uniform(0.01, 0.02, (n, num_blocks)).astype(np.float32)
    return QuantizedRows(pack(values, bits), scales, zeros)


@pytest.mark.parametrize("n", OUTPUTS)
@pytest.mark.parametrize("k", [4, 5, 31, 576])
def test_integers_are_exact_over_their_whole_range(library: ctypes.CDLL, k: int, n: int) -> None:
    random = np.random.default_rng(k)
    weights = random.integers(-128, 128, (k, n)).astype(np.int8)
    x = random.integers(-128, 128, (7, k)).astype(np.float32)
    weights[:, 0], x[0], x[1] = -128, -128, 127  # the largest sums that there are: 576 * 2^14 is below 2^24
    y = pack_channels(library, weights, np.ones(n, np.float32), scale=1).multiply(x)
    np.testing.assert_array_equal(y, x.astype(np.int64) @ weights.astype(np.int64))


def test_inputs_beyond_a_calibrated_range_are_cut_and_ties_go_to_even(library: ctypes.CDLL) -> None:
    x = np.array([[1e9, -1e9, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)
    y = pack_channels(library, np.eye(8, dtype=np.int8), np.ones(8, np.float32), scale=1).multiply(x)
    np.testing.assert_array_equal(y[0], [127, -128, 0, 2, 2, 0, -2, 126])


@pytest.mark.parametrize("n", [17, 64])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(8, 16), (8, 32), (8, 128), (4, 16), (4, 32), (4, 64)])
def test_blocks_are_those_of_float64(library: ctypes.CDLL, bits: int, block: int, has_zeros: bool, n: int) -> None:
    for k in (block, 3 * block, 3 * block + 5):
        rows = random_blocks(n, k, bits=bits, block=block, has_zeros=has_zeros)
        x = floats(13, k)
        x[3] = 0
        x[4, :block] = 0  # a block of zeros in a row that has others
        y = pack_blocks(library, rows, k, bits=bits).multiply(x)
        # Integers are equal; each block's scale, product and sum may round by 6e-8 of the largest partial sum.
        np.testing.assert_allclose(y, block_product(x, rows, bits=bits), rtol=1e-6, atol=2e-6 * np.abs(y).max())
        assert (y[3] == 0).all()


def test_what_export_writes_is_multiplied_closely(library: ctypes.CDLL) -> None:
    weight, x = floats(96, 192, seed=1), floats(9, 192)
    exact = x.astype(np.float64) @ weight.T
    for bits, error in ((8, 0.02), (4, 0.2)):
        rows = quantize_rows(weight, bits=bits, block_size=32, symmetric=bits == 8)
        y = pack_blocks(library, rows, 192, bits=bits).multiply(x)
        assert np.abs(y - exact).max() < error * np.abs(exact).max()


@pytest.mark.parametrize("n", [17, 64])
@pytest.mark.parametrize("k", [20, 333])
def test_a_calibrated_scale_is_that_of_all_rows(library: ctypes.CDLL, k: int, n: int) -> None:
    random = np.random.default_rng(k)
    weights, scales = random.integers(-127, 128, (k, n)).astype(np.int8), np.full(n, 0.01, np.float32)
    x, scale = floats(11, k), np.float32(0.02)
    y = pack_channels(library, weights, scales, scale=float(scale)).multiply(x)
    steps = np.clip(np.rint(x * (np.float32(1) / scale)), -128, 127)
    assert (np.abs(steps) > 126).any(), "values beyond the range are cut"
    exact = steps.astype(np.float64) @ weights * float(scale) * 0.01
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())  # two products in float32


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_groups_of_inputs_have_scales_of_their_own(library: ctypes.CDLL, group: int) -> None:
    k, n = 333, 40
    random = np.random.default_rng(group)
    weights, scales = random.integers(-127, 128, (k, n)).astype(np.int8), np.full(n, 0.01, np.float32)
    x = floats(14, k) * np.float32(10) ** random.integers(-3, 3, (14, 1)).astype(np.float32)
    y = pack_channels(library, weights, scales, group=group).multiply(x)
    integers, row_scales = quantized_inputs(x, group or k)
    seen = (integers * row_scales[..., None].astype(np.float64)).reshape(len(x), -1)[:, :k]
    exact = seen @ weights.astype(np.float64) * 0.01
    for row in range(len(x)):
        np.testing.assert_allclose(y[row], exact[row], rtol=1e-5, atol=2e-6 * np.abs(exact[row]).max())


def every_kind(library: ctypes.CDLL, n: int, k: int) -> Iterator[PackedWeights]:
    random = np.random.default_rng(n)
    for bits in (8, 4):
        for has_zeros in (False, True):
            rows = random_blocks(n, k, bits=bits, block=32, has_zeros=has_zeros)
            yield pack_blocks(library, rows, k, bits=bits)
    values, scales = random.integers(-127, 128, (k, n)).astype(np.int8), random.uniform(1, 2, n).astype(np.float32)
    for group in (0, 32, 64):
        yield pack_channels(library, values, scales, group=group)
    yield pack_channels(library, values, scales, scale=0.03)


@pytest.mark.parametrize("n", [49, 96])
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads(library: ctypes.CDLL, n: int) -> None:
    k = 416
    x = floats(1300, k)  # more than one tile
    for weights in every_kind(library, n, k):
        whole = weights.multiply(x, threads=2)
        alone = np.concatenate([weights.multiply(x[row : row + 1]) for row in range(len(x))])
        np.testing.assert_array_equal(whole.view(np.int32), alone.view(np.int32))
        for count in range(2, 27):
            some = weights.multiply(x[count : 2 * count], threads=1 + count % 3)
            np.testing.assert_array_equal(some.view(np.int32), whole[count : 2 * count].view(np.int32))


def test_no_rows_are_no_work(library: ctypes.CDLL) -> None:
    for weights in every_kind(library, 33, 64):
        assert weights.multiply(floats(0, 64)).shape == (0, 33)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_its_row_alone(library: ctypes.CDLL, bad: float) -> None:
    x = floats(7, 64)
    spoilt = x.copy()
    spoilt[2, 40] = bad
    others = [0, 1, 3, 4, 5, 6]
    rows = random_blocks(33, 64, bits=8, block=32, has_zeros=False)
    values = np.ones((64, 33), np.int8)
    for weights in (
        pack_blocks(library, rows, 64, bits=8),
        pack_channels(library, values, np.ones(33, np.float32), group=32),
        pack_channels(library, values, np.ones(33, np.float32)),
    ):
        y = weights.multiply(spoilt)
        assert not np.isfinite(y[2]).any()
        np.testing.assert_array_equal(y[others], weights.multiply(x)[others])
