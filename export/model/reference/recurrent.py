"""Recurrences in numpy and float32, over concatenated sequences; each begins with a state of zeros."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from export.model.description import Convolution

Array = NDArray[np.float32]

_CHUNK = 64
"""Tokens of a recurrence computed at once: enough for products of matrices, and few enough for a small system."""


def convolved(x: Array, conv: Convolution, tensors: Mapping[str, Array], edges: NDArray[np.int64]) -> Array:
    """A causal convolution of x `[tokens, size]`, cut into sequences at `edges`; tensors: the block's, by name."""
    weight = tensors[f"{conv.name}.weight"][:, 0]
    out = np.empty_like(x)
    for first, last in pairwise(edges):
        padded = np.concatenate([np.zeros((conv.width - 1, conv.size), np.float32), x[first:last]])
        out[first:last] = sum(weight[:, tap] * padded[tap : tap + last - first] for tap in range(conv.width))
    return out + tensors[f"{conv.name}.bias"] if conv.has_bias else out


def unit(x: Array) -> Array:
    """x over the length of its last axis."""
    return np.asarray(x / np.sqrt(np.einsum("...i,...i->...", x, x)[..., None] + np.float32(1e-6)))


def recurred(
    q: Array, k: Array, v: Array, decay: Array, edges: NDArray[np.int64], *, beta: Array | None = None
) -> Array:
    """A linear recurrence over sequences cut at `edges`; returns S q of each token, `[tokens, v_heads, v_dim]`.

    S = exp(decay) * S + d k^T, with d = v, or d = beta * (v - S k) after the decay if there is a beta (the delta rule).
    q, k `[tokens, k_heads, k_dim]`, decay and beta `[tokens, v_heads]`
    """
    group = v.shape[1] // k.shape[1]
    q, k = (np.repeat(x, group, axis=1).transpose(1, 0, 2) for x in (q, k))  # [heads, tokens, dim]
    v, decay = v.transpose(1, 0, 2), decay.T
    out = np.empty_like(v)
    for first, last in pairwise(edges):
        state = np.zeros((len(v), v.shape[2], k.shape[2]), np.float32)
        for start in range(first, last, _CHUNK):
            some = slice(start, min(start + _CHUNK, last))
            some_beta = None if beta is None else beta.T[:, some, None]
            out[:, some], state = _chunk(q[:, some], k[:, some], v[:, some], decay[:, some], some_beta, state)
    return out.transpose(1, 0, 2)


def _chunk(q: Array, k: Array, v: Array, decay: Array, beta: Array | None, state: Array) -> tuple[Array, Array]:
    """Some tokens at once, `[heads, n, ...]`: the output, and the state `[heads, v_dim, k_dim]` after them.

    Written out, d of token t is beta * (v - exp(sum of decays) * state k - what the tokens before it have added), which
    is one triangular system for the whole chunk (arXiv:2412.06464, section 3.3).
    """
    total = np.cumsum(decay, axis=1)[..., None]
    between = total - total.transpose(0, 2, 1)
    causal = np.tril(np.ones(between.shape[1:], np.bool_))
    kept = np.exp(np.where(causal, between, -np.inf))  # of token s in the state of token t
    faded = np.exp(total)
    added = v
    if beta is not None:
        earlier = np.tril(beta * (k @ k.transpose(0, 2, 1)) * kept, -1)
        added = beta * (v - faded * (k @ state.transpose(0, 2, 1)))
        added = np.linalg.solve(np.eye(k.shape[1], dtype=np.float32) + earlier, added)
    out = faded * (q @ state.transpose(0, 2, 1)) + ((q @ k.transpose(0, 2, 1)) * kept) @ added
    final = faded[:, -1:] * state + added.transpose(0, 2, 1) @ (k * kept[:, -1:].transpose(0, 2, 1))
    return out.astype(np.float32, copy=False), final.astype(np.float32, copy=False)
