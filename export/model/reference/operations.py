"""The walker's operations in numpy and float32, for the reference and for calibration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from export.model.description import (
    Activation,
    Attention,
    Block,
    Clamp,
    Experts,
    GatedDelta,
    Linear,
    Mamba2,
    Mlp,
    Norm,
    NormKind,
    Rotary,
    ShortConv,
)
from export.model.reference.recurrent import convolved, recurred, unit
from export.model.reference.routing import route
from export.model.rope import RopeTables
from export.model.walker import Stream

Array = NDArray[np.float32]

# Rows of attention scores computed at once. Most masked scores are never computed.
_ATTENTION_ROWS = 128


class NormWeights(NamedTuple):
    """A norm's float32 `[channels]`; for a 1 + w norm, weight is 1 + w."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One block's tensors, float32: matrices `[N, K]` and biases `[N]` by kind, norms and other tensors by name."""

    matrices: Mapping[str, Array]
    biases: Mapping[str, Array]
    norms: Mapping[str, NormWeights]
    tensors: Mapping[str, Array] = field(default_factory=dict)

    def product(self, kind: str, x: Array) -> Array:
        """x `[n, K]` times the matrix of that kind, without its bias."""
        return np.asarray(x @ self.matrices[kind].T)


class Product(Protocol):
    """Replaces `BlockWeights.product`."""

    def __call__(self, kind: str, x: Array, rows: NDArray[np.int64] | None, /) -> Array:
        """x `[n, K]` to `[n, N]`, without bias. rows: which tokens an expert gets; None means all tokens."""
        ...


Observe = Callable[[str, Array], object]
"""Gets "k" or "v", and one sequence's entries of that KV cache: `[n, kv_heads, head_dim]`, k rotated."""


class NumpyOperations:
    """`walker.Operations` for one block, over concatenated sequences: `[tokens, channels]`, cut at `edges`."""

    def __init__(
        self,
        weights: BlockWeights,
        edges: NDArray[np.int64],
        tables: Mapping[Rotary, RopeTables],
        product: Product | None,
        observe: Observe,
    ) -> None:
        self._weights, self._edges, self._tables, self._observe = weights, edges, tables, observe
        self._product = product
        self._rows: NDArray[np.int64] | None = None

    def norm(self, x: Array, norm: Norm) -> Array:
        return normed(x, self._weights.norms[norm.name], norm)

    def add_norm(self, stream: Stream[Array], norm: Norm) -> tuple[Array, Array]:
        total = self.add(stream.value, stream.addend) if stream.addend is not None else stream.value
        return self.norm(total, norm), total

    def sum(self, stream: Stream[Array]) -> tuple[Array, Array]:
        total = stream.value if stream.addend is None else self.add(stream.value, stream.addend)
        return total, total

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def scale(self, x: Array, factor: float) -> Array:
        return x * np.float32(factor)

    def clip(self, x: Array, limit: float) -> Array:
        return np.clip(x, np.float32(-limit), np.float32(limit))

    def linear(self, x: Array, linear: Linear) -> Array:
        kind = linear.site.kind
        out = self._weights.product(kind, x) if self._product is None else self._product(kind, x, self._rows)
        return out + self._weights.biases[kind] if linear.has_bias else out

    def attend(self, qkv: Array, block: Block) -> Array:
        a = block.attention
        heads = qkv.reshape(len(qkv), -1, a.head_dim)
        q, k, v = np.split(heads, [a.num_heads, a.num_heads + a.num_kv_heads], axis=1)
        attended = np.empty((len(qkv), a.q_size), np.float32)
        sinks = None if a.sinks is None else self._weights.tensors[a.sinks]
        for first, last in pairwise(self._edges):
            keys = self._turned(k[first:last], a.k_norm, a)
            self._observe("k", keys)
            self._observe("v", v[first:last])
            queries = self._turned(q[first:last], a.q_norm, a)
            attended[first:last] = _attention(queries, keys, v[first:last], a, sinks)
        return attended

    def _turned(self, x: Array, norm: Norm | None, a: Attention) -> Array:
        """Norm and rotary embedding of one sequence's heads `[n, heads, head_dim]`, in the model's order."""
        x = self._rotated(x, a.rotary) if a.norms_rotated else x
        if norm is not None:  # over each head, or over all heads
            x = self.norm(x.reshape(len(x), -1, norm.size), norm).reshape(x.shape)
        return x if a.norms_rotated else self._rotated(x, a.rotary)

    def convolve(self, x: Array, mixer: ShortConv) -> Array:
        b, c, x = np.split(x, 3, axis=1)
        return c * convolved(b * x, mixer.conv, self._weights.tensors, self._edges)

    def delta(self, x: Array, gates: Array, mixer: GatedDelta) -> Array:
        tensors, heads = self._weights.tensors, mixer.heads
        mixed = _silu(convolved(x[:, : mixer.conv.size], mixer.conv, tensors, self._edges))
        q, k, v = np.split(mixed, [heads.k_size, 2 * heads.k_size], axis=1)
        b, a = np.split(gates, 2, axis=1)
        decay = -np.exp(tensors[mixer.a_log]) * np.logaddexp(0, a + tensors[mixer.dt_bias])
        out = recurred(
            unit(q.reshape(len(x), -1, heads.k_dim)) / np.float32(np.sqrt(heads.k_dim)),
            unit(k.reshape(len(x), -1, heads.k_dim)),
            v.reshape(len(x), -1, heads.v_dim),
            decay,
            self._edges,
            beta=np.asarray(1 / (1 + np.exp(-b)), np.float32),
        )
        return self.norm(out, mixer.norm).reshape(len(x), -1) * _silu(x[:, mixer.conv.size :])

    def mamba(self, x: Array, gates: Array, mixer: Mamba2) -> Array:
        tensors, heads = self._weights.tensors, mixer.heads
        z, mixed = np.split(x, [heads.v_size], axis=1)
        mixed = _silu(convolved(mixed, mixer.conv, tensors, self._edges))
        v, k, q = np.split(mixed, [heads.v_size, heads.v_size + heads.k_size], axis=1)
        k, q = (part.reshape(len(x), -1, heads.k_dim) for part in (k, q))
        v = v.reshape(len(x), -1, heads.v_dim)
        dt = np.clip(np.logaddexp(0, gates + tensors[mixer.dt_bias]), *mixer.dt_limits).astype(np.float32)
        out = recurred(q, k, v * dt[..., None], -np.exp(tensors[mixer.a_log]) * dt, self._edges)
        out += tensors[mixer.d][:, None] * v
        gated = out.reshape(len(x), -1) * _silu(z)
        return gated if mixer.norm is None else self.norm(gated, mixer.norm)

    def activate(self, up: Array, mlp: Mlp) -> Array:
        if mlp.clamp is not None:
            return _clamped(up, mlp.clamp)
        act = _ACTIVATIONS[mlp.activation]
        if not mlp.is_gated:
            return act(up)
        gate, up = np.split(up, 2, axis=1)
        activated = act(gate)
        activated *= up
        return activated

    def mix(self, x: Array, experts: Experts, run: Callable[[Array, Mlp], Array]) -> Array:
        bias = None if experts.choice_bias is None else self._weights.tensors[experts.choice_bias]
        chosen, weights = route(self.linear(x, experts.router), experts.routing, bias)
        out = np.zeros_like(x)
        for idx, expert in enumerate(experts.experts):
            self._rows, place = np.nonzero(chosen == idx)
            if len(self._rows):
                out[self._rows] += run(x[self._rows], expert) * weights[self._rows, place][:, None]
        self._rows = None
        return out

    def split(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]:
        return np.split(x, np.cumsum(sizes)[:-1], axis=1)

    def unfold(self, q: Array, kv: Array, rotating: Array, attention: Attention) -> Array:
        latent, num_heads = attention.latent, attention.num_heads
        assert latent is not None
        q_still, q_turning = np.split(q.reshape(len(q), num_heads, -1), [latent.still_dim], axis=2)
        k_still, v = np.split(kv.reshape(len(kv), num_heads, -1), [latent.still_dim], axis=2)
        k_turning = np.broadcast_to(rotating[:, None], q_turning.shape)
        padding = np.zeros((len(v), num_heads, attention.head_dim - latent.value_dim), np.float32)
        pairs = ((q_turning, q_still), (k_turning, k_still), (v, padding))
        return np.concatenate([np.concatenate(pair, axis=2).reshape(len(q), -1) for pair in pairs], axis=1)

    def without_padding(self, attended: Array, attention: Attention) -> Array:
        assert attention.latent is not None
        heads = attended.reshape(len(attended), attention.num_heads, -1)
        return heads[..., : attention.latent.value_dim].reshape(len(attended), -1)

    def gate(self, x: Array, logits: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-logits)))

    def _rotated(self, x: Array, rotary: Rotary | None) -> Array:
        """Rotate pairs of the first `dim` channels of `[n, heads, head_dim]` by their position's angle."""
        if rotary is None:
            return x
        half, tables = rotary.dim // 2, self._tables[rotary]
        cos, sin = tables.cos[: len(x), None], tables.sin[: len(x), None]
        if rotary.interleaved:
            first, second = x[..., 0 : rotary.dim : 2], x[..., 1 : rotary.dim : 2]
            turned = np.empty_like(x)
            turned[..., 0 : rotary.dim : 2] = first * cos - second * sin
            turned[..., 1 : rotary.dim : 2] = second * cos + first * sin
            turned[..., rotary.dim :] = x[..., rotary.dim :]
            return turned
        first, second = x[..., :half], x[..., half : rotary.dim]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., rotary.dim :]], -1)


def normed(x: Array, weights: NormWeights, norm: Norm) -> Array:
    """A norm over the last axis."""
    if norm.kind is NormKind.LAYER:
        x = x - x.mean(-1, keepdims=True)
    square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    out = np.asarray(x / np.sqrt(square + np.float32(norm.epsilon)))
    out *= weights.weight
    return out if weights.bias is None else out + weights.bias


def _silu(x: Array) -> Array:
    """x / (1 + exp(-x)). If exp overflows to infinity, the quotient is 0, the right limit."""
    out = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    return np.divide(x, out, out=out)


def _gelu_tanh(x: Array) -> Array:
    """GELU in its tanh approximation (arXiv:1606.08415, section 2)."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)))


def _gelu(x: Array) -> Array:
    """x * (1 + erf(x / sqrt 2)) / 2. The error of erf is below 1.5e-7 (Abramowitz and Stegun, formula 7.1.26)."""
    z = np.abs(x) / np.float32(np.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    erf = np.copysign(1 - series * np.exp(-z * z), x)
    return np.asarray(np.float32(0.5) * x * (1 + erf))


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


_ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    Activation.SILU: _silu,
    Activation.GELU: _gelu,
    Activation.RELU: _relu,
    Activation.RELU2: lambda x: np.square(_relu(x)),
    Activation.GELU_TANH: _gelu_tanh,
}


def _clamped(up: Array, clamp: Clamp) -> Array:
    """See `Clamp`."""
    gate, up = np.split(up, 2, axis=1)
    limit = np.float32(clamp.limit)
    gate = np.minimum(gate, limit)
    with np.errstate(over="ignore"):
        return np.asarray((np.clip(up, -limit, limit) + 1) * gate / (1 + np.exp(-np.float32(clamp.alpha) * gate)))


def _attention(q: Array, k: Array, v: Array, attention: Attention, sinks: Array | None) -> Array:
    """Causal attention of one sequence; q `[n, heads, d]`, k and v `[n, kv_heads, d]`; returns `[n, heads * d]`.

    Query heads that share a key-value head are rows of one product.
    """
    n, num_heads, dim = q.shape
    num_kv, group, window = k.shape[1], num_heads // k.shape[1], attention.window
    scaled = q / np.sqrt(np.float32(dim)) if attention.scale is None else q * np.float32(attention.scale)
    grouped = scaled.reshape(n, num_kv, group, dim).transpose(1, 2, 0, 3)
    keys, values = np.ascontiguousarray(k.transpose(1, 2, 0)), np.ascontiguousarray(v.transpose(1, 0, 2))
    out = np.empty((n, num_kv, group, dim), np.float32)
    for start in range(0, n, _ATTENTION_ROWS):
        stop = min(start + _ATTENTION_ROWS, n)
        first = max(0, start - window + 1) if window else 0
        masked = first if window else start  # without a window, every row attends to all columns before
        distance = np.arange(start, stop)[:, None] - np.arange(masked, stop)
        mask = np.where((distance < 0) | (distance >= (window or n)), np.float32(-np.inf), np.float32(0))
        rows = grouped[:, :, start:stop].reshape(num_kv, -1, dim)
        scores = rows @ keys[:, :, first:stop]
        if attention.softcap is not None:
            cap = np.float32(attention.softcap)
            scores = cap * np.tanh(scores / cap)
        if attention.alibi:
            slopes = np.array(attention.alibi, np.float32).reshape(num_kv, group, 1, 1)
            back = np.arange(start, stop, dtype=np.float32)[:, None] - np.arange(first, stop, dtype=np.float32)
            scores.reshape(num_kv, group, stop - start, -1)[...] -= slopes * back
        scores.reshape(num_kv, group, stop - start, -1)[..., masked - first :] += mask
        highest = scores.max(-1, keepdims=True)
        of_sinks = None
        if sinks is not None:
            of_rows = np.repeat(sinks.reshape(num_kv, group, 1), stop - start, axis=1).reshape(num_kv, -1, 1)
            highest = np.maximum(highest, of_rows)
            of_sinks = np.exp(of_rows - highest)
        scores -= highest
        np.exp(scores, out=scores)
        mixed = scores @ values[:, first:stop]
        mixed /= scores.sum(-1, keepdims=True) + (0 if of_sinks is None else of_sinks)
        out[start:stop] = mixed.reshape(num_kv, group, -1, dim).transpose(2, 0, 1, 3)
    return out.reshape(n, -1)
