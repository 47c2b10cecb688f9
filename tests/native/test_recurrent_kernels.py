"""Kernels of recurrences against float64, and the same bits wherever a row is cut and whatever runs beside it."""

import ctypes
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.native.recurrent import convolve, recur

Array = NDArray[np.float32]


def arrays(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected(x: Array, weight: Array, bias: Array | None, *, is_gated: bool) -> NDArray[np.float64]:
    """One sequence from its beginning, in float64."""
    wide = x.astype(np.float64)
    b, c, inner = np.split(wide, 3, axis=1) if is_gated else (1.0, 1.0, wide)
    padded = np.concatenate([np.zeros((len(weight) - 1, weight.shape[1])), b * inner])
    total = sum(tap * padded[j : j + len(x)] for j, tap in enumerate(weight))
    return np.asarray(c * (total if bias is None else total + bias))


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("size", "width"), [(1, 2), (37, 3), (64, 4), (600, 3)])
def test_a_convolution_is_that_of_float64(library: ctypes.CDLL, size: int, width: int, is_gated: bool) -> None:
    x, weight, bias = arrays(20, (1 + 2 * is_gated) * size), arrays(width, size, seed=1), arrays(size, seed=2)
    for some_bias in (None, bias):
        state = np.full((3, width - 1, size), np.nan, np.float32)  # of an earlier request: not read
        out = convolve(library, x, state, weight, some_bias, ([1], [0], [20]), is_gated=is_gated)
        exact = expected(x, weight, some_bias, is_gated=is_gated)
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)
        kept = x[:, :size] * x[:, 2 * size :] if is_gated else x
        np.testing.assert_array_equal(state[1], kept[21 - width :])
        assert np.isnan(state[[0, 2]]).all(), "other slots are not written"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_wherever_it_is_cut(library: ctypes.CDLL, threads: int) -> None:
    """Rows of 1, 0, 9 and 2 tokens beside each other, against each row by itself in one piece; shorter than the state
    too."""
    size, width, starts, lens = 300, 4, [5, 3, 0, 1], [1, 0, 9, 2]
    weight, bias = arrays(width, size, seed=1), arrays(size, seed=2)
    texts = [
        arrays(start + count, 3 * size, seed=7 + row)
        for row, (start, count) in enumerate(zip(starts, lens, strict=True))
    ]
    whole, pieces = (np.full((6, width - 1, size), np.nan, np.float32) for _ in range(2))
    outs = [
        convolve(library, text, whole, weight, bias, ([slot], [0], [len(text)]), is_gated=True)
        for slot, text in zip((4, 2, 0, 5), texts, strict=True)
    ]
    for slot, text, start in zip((4, 2, 0, 5), texts, starts, strict=True):
        for place in range(start):
            convolve(library, text[[place]], pieces, weight, bias, ([slot], [place], [1]), is_gated=True)
    packed = np.concatenate([text[start:] for text, start in zip(texts, starts, strict=True)])
    rows = ([4, 2, 0, 5], starts, lens)
    found = convolve(library, packed, pieces, weight, bias, rows, is_gated=True, threads=threads)
    tails = [out[start:] for out, start in zip(outs, starts, strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(tails))
    np.testing.assert_array_equal(pieces, whole)


class Heads(NamedTuple):
    """Sizes of a gated delta rule."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int

    def inputs(self, num_tokens: int, seed: int = 0) -> tuple[Array, Array]:
        width = 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
        return arrays(num_tokens, width, seed=seed), arrays(num_tokens, 2 * self.v_heads, seed=seed + 1)

    def state(self, num_slots: int) -> Array:
        """Of an earlier request: not read."""
        return np.full((num_slots, self.v_heads, self.v_dim, self.k_dim), np.nan, np.float32)

    def vectors(self) -> tuple[Array, Array]:
        rates = np.random.default_rng(4).uniform(0.01, 16, self.v_heads)
        return np.log(rates).astype(np.float32), arrays(self.v_heads, seed=5)

    def expected(self, qkv: Array, gates: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """One sequence from its beginning, token by token in float64: the output, and the state."""
        a_log, dt_bias = (vector.astype(np.float64) for vector in self.vectors())
        state, outs = np.zeros((self.v_heads, self.v_dim, self.k_dim)), []
        k_size = self.k_heads * self.k_dim
        bs, gate_inputs = np.split(gates.astype(np.float64), 2, axis=1)
        for token, b, a in zip(qkv.astype(np.float64), bs, gate_inputs, strict=True):
            q, k = (x.reshape(self.k_heads, -1) for x in (token[:k_size], token[k_size : 2 * k_size]))
            q, k = (
                np.repeat(x / np.sqrt((x * x).sum(1, keepdims=True) + 1e-6), self.v_heads // self.k_heads, 0)
                for x in (q, k)
            )
            v = token[2 * k_size :].reshape(self.v_heads, -1)
            state *= np.exp(-np.exp(a_log) * np.log1p(np.exp(a + dt_bias)))[:, None, None]
            known = np.einsum("hvk,hk->hv", state, k)
            delta = (v - known) / (1 + np.exp(-b))[:, None]
            state += delta[:, :, None] * k[:, None]
            outs.append(np.einsum("hvk,hk->hv", state, q) / np.sqrt(self.k_dim))
        return np.array(outs).reshape(len(qkv), -1), state


@pytest.mark.parametrize("heads", [Heads(1, 1, 8, 5), Heads(2, 4, 16, 37), Heads(2, 2, 100, 64)])
def test_a_delta_rule_is_that_of_float64(library: ctypes.CDLL, heads: Heads) -> None:
    qkv, gates = heads.inputs(40)
    state = heads.state(3)
    out = recur(library, qkv, gates, state, heads.vectors(), ([1], [0], [40]))
    expected, last = heads.expected(qkv, gates)
    # Sums of some hundred products near 1.
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(state[1], last, atol=2e-6)
    assert np.isnan(state[[0, 2]]).all(), "other slots are not written"


def test_a_sum_that_decays_is_that_of_float64(library: ctypes.CDLL) -> None:
    heads = Heads(1, 3, 24, 40)
    qkv, _ = heads.inputs(40)
    decay = -np.abs(arrays(40, heads.v_heads, seed=3))
    state = heads.state(3)
    out = recur(library, qkv, decay, state, (None, None), ([1], [0], [40]))
    q, k, v = np.split(qkv.astype(np.float64), [24, 48], axis=1)
    expected, last = [], np.zeros((3, 40, 24))
    for idx in range(40):
        last = last * np.exp(decay[idx].astype(np.float64))[:, None, None] + v[idx].reshape(3, 40, 1) * k[idx]
        expected.append((last @ q[idx]).ravel())
    # Products of sums of 24, each some units large.
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(state[1], last, atol=1e-5)
    pieces = heads.state(3)
    parts = [
        recur(library, qkv[cut], decay[cut], pieces, (None, None), ([1], [cut.start], [cut.stop - cut.start]))
        for cut in (slice(0, 1), slice(1, 33), slice(33, 40))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), out)
    np.testing.assert_array_equal(pieces[1], state[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_delta_rule_has_the_same_bits_wherever_a_row_is_cut(library: ctypes.CDLL, threads: int) -> None:
    heads, slots, starts, lens = Heads(2, 4, 20, 70), (4, 2, 0, 5), [5, 3, 0, 1], [1, 0, 9, 2]
    texts = [heads.inputs(start + count, seed=start) for start, count in zip(starts, lens, strict=True)]
    whole, pieces, vectors = heads.state(6), heads.state(6), heads.vectors()
    tails = []
    for slot, (qkv, gates), start in zip(slots, texts, starts, strict=True):
        tails.append(recur(library, qkv, gates, whole, vectors, ([slot], [0], [len(qkv)]))[start:])
        for at in range(start):
            recur(library, qkv[[at]], gates[[at]], pieces, vectors, ([slot], [at], [1]))
    qkv, gates = (
        np.concatenate([text[part][start:] for text, start in zip(texts, starts, strict=True)]) for part in (0, 1)
    )
    found = recur(library, qkv, gates, pieces, vectors, (list(slots), starts, lens), threads)
    np.testing.assert_array_equal(found, np.concatenate(tails))
    np.testing.assert_array_equal(pieces, whole)


def test_a_call_that_does_not_fit_is_refused(library: ctypes.CDLL) -> None:
    x, state, weight = arrays(2, 8), arrays(3, 2, 8), arrays(3, 8)
    for rows, fault in ((([3], [0], [2]), "outside of the states"), (([0], [-1], [2]), "negative")):
        with pytest.raises(ValueError, match=fault):
            convolve(library, x, state, weight, None, rows, is_gated=False)
    idle = state.copy()
    convolve(library, x[:0], state, weight, None, ([7], [0], [0]), is_gated=False)
    np.testing.assert_array_equal(state, idle)
