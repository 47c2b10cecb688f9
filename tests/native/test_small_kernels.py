"""Sum, norm and gate kernels against float64, and the same bits for a row whatever runs beside it."""

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.native.library import variant_of
from tests.support.native.calls import add_norm, gate_up

SIZES = [1, 3, 16, 37, 64, 576, 1001]


def arrays(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("is_layer_norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sum_and_norm_are_those_of_float64(library: ctypes.CDLL, size: int, is_layer_norm: bool) -> None:
    x, skip, weight, bias = arrays(5, size), arrays(5, size, seed=1), arrays(size, seed=2), arrays(size, seed=3)
    x += 3  # a mean that layer norm has to take off
    normed, total = add_norm(library, x, skip, weight, bias, is_layer_norm=is_layer_norm)
    np.testing.assert_array_equal(total, x + skip)
    exact = total.astype(np.float64)
    exact = exact - exact.mean(-1, keepdims=True) if is_layer_norm else exact
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    # Every step of the sum of squares rounds by 6e-8; a layer norm of one value is of rounding only.
    np.testing.assert_allclose(normed, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_without_sum_or_bias(library: ctypes.CDLL, size: int) -> None:
    x, weight = arrays(3, size), arrays(size, seed=2)
    normed, _ = add_norm(library, x, None, weight, None, is_layer_norm=False)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(normed, exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_gate_is_that_of_float64(library: ctypes.CDLL, size: int, is_gelu: bool) -> None:
    stacked = arrays(4, 2 * size) * 8
    stacked[0, :size] = 200 * np.sign(stacked[0, :size])  # far beyond where exp overflows
    gate, up = np.split(stacked.astype(np.float64), 2, axis=1)
    inner = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3) if is_gelu else gate
    with np.errstate(over="ignore"):
        exact = gate / (1 + np.exp(-inner)) * up
    # Deep in the tail of gelu the argument of exp is large, and its rounding is the result's relative error.
    np.testing.assert_allclose(gate_up(library, stacked, is_gelu=is_gelu), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_clamped_gate_is_that_of_float64(library: ctypes.CDLL, size: int) -> None:
    stacked = arrays(4, 2 * size) * 8
    gate, up = np.split(stacked.astype(np.float64), 2, axis=1)
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    exact = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    np.testing.assert_allclose(gate_up(library, stacked, limit=7, alpha=1.702), exact, rtol=2e-5, atol=1e-6)


def test_exp_in_silu_is_within_a_few_units_in_the_last_place(library: ctypes.CDLL) -> None:
    gate = np.linspace(-80, 80, 20_000, dtype=np.float32)
    stacked = np.concatenate([gate, np.ones_like(gate)])[None]
    exact = gate / (1 + np.exp(-gate.astype(np.float64)))
    # exp is off by at most 2 units, the sum and the quotient by half a unit each: 3 units of 2^-23 together.
    np.testing.assert_allclose(gate_up(library, stacked, is_gelu=False)[0], exact, rtol=3 * 2.0**-23)


def test_what_is_not_a_number_stays_so(library: ctypes.CDLL) -> None:
    stacked = np.array([[np.nan, 1, 1, np.nan]], np.float32)
    assert np.isnan(gate_up(library, stacked, is_gelu=False)).all()
    assert np.isnan(gate_up(library, stacked, is_gelu=True)).all()
    assert np.isnan(gate_up(library, stacked, limit=7)).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [37, 576])
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads(library: ctypes.CDLL, size: int, threads: int) -> None:
    x, skip, weight = arrays(200, size), arrays(200, size, seed=1), arrays(size, seed=2)
    for is_layer_norm in (False, True):
        whole = add_norm(library, x, skip, weight, None, is_layer_norm=is_layer_norm, threads=threads)
        for row in (0, 7, 199):
            alone = add_norm(library, x[row : row + 1], skip[row : row + 1], weight, None, is_layer_norm=is_layer_norm)
            np.testing.assert_array_equal(whole[0][row], alone[0][0])
    gated = gate_up(library, np.concatenate([x, skip], axis=1), is_gelu=False, threads=threads)
    for row in (0, 7, 199):
        alone_row = np.concatenate([x[row : row + 1], skip[row : row + 1]], axis=1)
        np.testing.assert_array_equal(gated[row], gate_up(library, alone_row, is_gelu=False)[0])


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_are_no_work(library: ctypes.CDLL, rows: int) -> None:
    normed, _ = add_norm(library, arrays(rows, 8), None, arrays(8), None, is_layer_norm=False)
    assert normed.shape == (rows, 8)


def test_the_loop_of_the_int8_peak_multiplies_what_it_counts(library: ctypes.CDLL) -> None:
    """Bytes of 3 times bytes of 1: every sum of the sink's element has 4 products of 3, in all sums of all rounds."""
    sink = ctypes.c_int32()
    library.headrace_multiply_bytes.restype = ctypes.c_int64
    num_operations = library.headrace_multiply_bytes(ctypes.c_size_t(1000), ctypes.byref(sink))
    assert num_operations % 2000 == 0
    width = {"avx512vnni": 16, "avx2": 8, "generic": 4}[variant_of(library)]
    assert sink.value == num_operations // 2 // width * 3
