"""The attention kernel against float64, and the same bits for a token at any cut, in any batch, with any threads."""

import ctypes
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.native.attention import CACHE_TYPES, Layer

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "rotary_dim": 64},
    "norms": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "rotary_dim": 128, "has_norms": True},
    "partial": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 80, "rotary_dim": 32, "is_interleaved": True},
    "window": {"num_heads": 14, "num_kv_heads": 2, "head_dim": 32, "rotary_dim": 32, "window": 100},
    "capped": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256, "softcap": 5.0, "scale": 0.1, "window": 300},
    "sinks": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "rotary_dim": 64, "window": 128, "has_sinks": True},
    "odd": {"num_heads": 5, "num_kv_heads": 1, "head_dim": 36, "rotary_dim": 36, "has_norms": True},
}
CAPACITY = 800


@pytest.fixture(scope="module", params=CACHE_TYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    found: np.dtype[Any] = request.param
    return found


def layer_of(shape: str, dtype: np.dtype[Any], num_slots: int = 3) -> Layer:
    return Layer(**SHAPES[shape], dtype=dtype, num_slots=num_slots, capacity=CAPACITY)


def tokens(layer: Layer, count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, layer.width)).astype(np.float32)


def run_pieces(
    library: ctypes.CDLL, layer: Layer, qkv: NDArray[np.float32], slot: int, sizes: list[int], threads: int = 1
) -> NDArray[np.float32]:
    """One row alone, cut into pieces of these sizes."""
    found, past = [], 0
    for size in sizes:
        found.append(layer.attend(library, qkv[past : past + size], [slot], [past], [size], threads))
        past += size
    return np.concatenate(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_that_of_float64(library: ctypes.CDLL, dtype: np.dtype[Any], shape: str) -> None:
    layer = layer_of(shape, dtype)
    qkv = tokens(layer, 610)
    out = run_pieces(library, layer, qkv, 1, [1, 500, 9, 99, 1], threads=2)
    # A score is a float32 sum of head_dim products, so off by about sqrt(head_dim) / 2 units of 6e-8 of its size, which
    # is at most 4 times the queries' and keys' here; the weights, and so the outputs, are off by as much.
    np.testing.assert_allclose(out, layer.expected(qkv, 1, 0), rtol=0, atol=6e-6)


@pytest.mark.parametrize("shape", ["grouped", "partial", "window", "capped"])
def test_the_cache_holds_what_numpy_rounds_to(library: ctypes.CDLL, dtype: np.dtype[Any], shape: str) -> None:
    """To the bit. Shapes without norms, whose sums numpy orders otherwise."""
    layer = layer_of(shape, dtype)
    qkv = tokens(layer, 300) * np.float32(1.5)
    qkv[5, -3:] = [1e6, -1e6, 6e-8]  # beyond every range, and below float16's normal numbers
    run_pieces(library, layer, qkv, 2, [299, 1])
    heads = qkv.reshape(300, -1, layer.head_dim)
    keys = [
        layer.rounded(layer.prepared(token[layer.num_heads : -layer.num_kv_heads], "k_norm", position), "k_scale")
        for position, token in enumerate(heads)
    ]
    values = [layer.rounded(token[-layer.num_kv_heads :], "v_scale") for token in heads]
    np.testing.assert_array_equal(layer.keys[2, :, :300], np.stack(keys, axis=1))
    np.testing.assert_array_equal(layer.values[2, :, :300], np.stack(values, axis=1))
    untouched = layer_of(shape, dtype).keys[0]
    np.testing.assert_array_equal(layer.keys[0], untouched)
    np.testing.assert_array_equal(layer.keys[2, :, 300:], untouched[:, 300:])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_row_may_be_cut_anywhere(library: ctypes.CDLL, dtype: np.dtype[Any], data: st.DataObject) -> None:
    layer = layer_of(data.draw(st.sampled_from(sorted(SHAPES))), dtype)
    qkv = tokens(layer, data.draw(st.sampled_from([1, 40, 257, 300, 620])))
    whole = run_pieces(library, layer, qkv, 0, [len(qkv)])
    cuts = data.draw(st.sets(st.integers(1, max(1, len(qkv) - 1)), max_size=6))
    edges = [0, *sorted(cut for cut in cuts if cut < len(qkv)), len(qkv)]
    sizes = [stop - start for start, stop in pairwise(edges)]
    threads = data.draw(st.integers(1, 3))
    np.testing.assert_array_equal(run_pieces(library, layer, qkv, 2, sizes, threads), whole)


@pytest.mark.parametrize("shape", ["grouped", "window", "odd"])
def test_a_chunk_and_its_tokens_one_by_one_are_the_same(library: ctypes.CDLL, dtype: np.dtype[Any], shape: str) -> None:
    layer = layer_of(shape, dtype)
    qkv = tokens(layer, 530)
    whole = run_pieces(library, layer, qkv, 0, [530], threads=2)
    np.testing.assert_array_equal(run_pieces(library, layer, qkv, 1, [1] * 530), whole)
    np.testing.assert_array_equal(layer.keys[1, :, :530], layer.keys[0, :, :530])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_row_is_the_same_beside_any_others(library: ctypes.CDLL, dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Rows of any lengths in any slots, some idle, decode and prefill in one call."""
    layer = layer_of(data.draw(st.sampled_from(sorted(SHAPES))), dtype, num_slots=7)
    slots = data.draw(st.permutations(range(1, 7)))[: data.draw(st.integers(1, 6))]
    past = [data.draw(st.sampled_from([0, 3, 255, 256, 400])) for _ in slots]
    query = [data.draw(st.sampled_from([0, 1, 1, 2, 30, 140])) for _ in slots]
    rows = [tokens(layer, past[idx] + query[idx], seed=idx) for idx in range(len(slots))]
    for slot, before, qkv in zip(slots, past, rows, strict=True):
        if before:
            run_pieces(library, layer, qkv[:before], slot, [before])
    packed = np.concatenate([qkv[before:] for before, qkv in zip(past, rows, strict=True)])
    found = layer.attend(library, packed, list(slots), past, query, threads=data.draw(st.integers(1, 3)))
    for before, qkv, out in zip(past, rows, np.split(found, np.cumsum(query)[:-1]), strict=True):
        if len(out):
            alone = run_pieces(library, layer, qkv, 0, [len(qkv)])
            np.testing.assert_array_equal(out, alone[before:])


def test_a_long_row_is_cut_between_threads_to_the_same_bits(library: ctypes.CDLL, dtype: np.dtype[Any]) -> None:
    layer = Layer(**SHAPES["grouped"], dtype=dtype, num_slots=1, capacity=5000)
    qkv = tokens(layer, 4901)
    layer.attend(library, qkv[:4900], [0], [0], [4900])
    one, many = (layer.attend(library, qkv[4900:], [0], [4900], [1], threads) for threads in (1, 3))
    np.testing.assert_array_equal(one, many)
    np.testing.assert_allclose(one, layer.expected(qkv[4900:], 0, 4900), rtol=0, atol=6e-6)


def test_what_is_not_a_number_stays_in_its_row(library: ctypes.CDLL, dtype: np.dtype[Any]) -> None:
    layer = layer_of("grouped", dtype)
    qkv = tokens(layer, 4)
    qkv[1, 0] = np.nan  # a query's channel
    out = layer.attend(library, qkv, [0, 1, 2], [0, 0, 0], [1, 1, 2])
    assert np.isnan(out[1, :64]).all()
    assert np.isfinite(out[[0, 2, 3]]).all()


def test_no_rows_are_no_work(library: ctypes.CDLL, dtype: np.dtype[Any]) -> None:
    layer = layer_of("grouped", dtype)
    assert layer.attend(library, tokens(layer, 0), [], [], []).shape == (0, 9 * 64)
    assert layer.attend(library, tokens(layer, 0), [0, 1], [0, 5], [0, 0], threads=2).shape == (0, 9 * 64)


@pytest.mark.parametrize(
    ("slots", "past", "query", "words"),
    [
        ([3], [0], [1], "slot"),
        ([-1], [0], [1], "slot"),
        ([0], [CAPACITY], [1], "longer than the cache"),
        ([0], [-1], [1], "negative"),
    ],
)
def test_rows_outside_the_cache_are_refused(
    native_library: ctypes.CDLL, slots: list[int], past: list[int], query: list[int], words: str
) -> None:
    layer = layer_of("grouped", np.dtype(np.float32))
    with pytest.raises(ValueError, match=words):
        layer.attend(native_library, tokens(layer, 1), slots, past, query)
