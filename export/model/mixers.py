"""How the tokens of a block reach each other: attention, or a recurrence with a state of fixed size.

Part of the description (description.py). Attention has K and V, which grow with every token and can be cut back to an
earlier length. A recurrence has a `State`, which can only go forward.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from export.model.layers import Linear, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Frequencies of a rotary embedding, and how they are scaled for contexts beyond the trained length.

    kind: default | dynamic | linear | ntk | llama3 | yarn | longrope. Only the fields of that kind are read; ntk has a
        factor of the base; dynamic changes nothing up to original_max_len, and no graph is longer
    short_factors, long_factors: longrope's divisor of each frequency, for up to original_max_len tokens and for more
    short_scale, long_scale: longrope's factors of cos and sin, if it has its own
    is_long: whether long_factors and long_scale apply, see `ModelConfig.for_length`
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    short_scale: float | None = None
    long_scale: float | None = None
    is_long: bool = False

    @property
    def longest(self) -> int:
        """The longest sequence, in tokens, that it was made for."""
        factor = 1 if self.kind in ("default", "dynamic", "ntk") else self.factor
        return int(self.original_max_len * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The rotary embedding of a layer's queries and keys.

    dim: the first channels of each head, which rotate; the others do not
    interleaved: channels 2i and 2i + 1 are a pair; otherwise i and i + dim / 2
    """

    rope: RopeConfig
    head_dim: int
    dim: int
    interleaved: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all channels rotate."""
        return self.dim == self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434): queries, keys and values are made of narrower vectors.

    `Attention.qkv` makes those: the queries or their latent, the latent of keys and values, and the rotating channels
    of keys, which all heads share. A head's rotating channels come first. Values are filled up with zeros to head_dim.

    q_norm, q: norm and projection of the queries' latent; None if `qkv` has the queries themselves
    kv_norm, kv: of the latent of keys and values; `kv` has for each head still_dim rows of keys, then value_dim
    still_dim: channels of a head that do not rotate, the first of the checkpoint's; value_dim: of a head's values
    """

    q_norm: Norm | None
    q: Linear | None
    kv_norm: Norm
    kv: Linear
    still_dim: int
    value_dim: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.kv,) if self.q is None else (self.q, self.kv)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.kv_norm,) if self.q_norm is None else (self.q_norm, self.kv_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal attention of one block.

    qkv: queries, keys and values stacked in this order; o: the output projection
    scale: of the scores; None is 1 / sqrt(head_dim)
    softcap: scores become softcap * tanh(score / softcap)
    window: in tokens, including the token itself; None for no window
    q_norm, k_norm: norms over each head, or over all heads together if that is their size
    alibi: slopes of the heads: a score falls by its head's slope with every token between query and key
    clip: queries, keys and values are limited to -clip .. clip
    norms_rotated: whether q_norm and k_norm come behind the rotary embedding
    latent: None if `qkv` makes queries, keys and values themselves
    sinks: name of a tensor `[num_heads]` of scores that take a share of each head's softmax and add no value
    gate: its outputs' sigmoids multiply the attended heads, channel by channel, before `o`
    """

    qkv: Linear
    o: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    rotary: Rotary | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: str | None = None
    latent: Latent | None = None
    gate: Linear | None = None
    norms_rotated: bool = False
    alibi: tuple[float, ...] = ()
    clip: float | None = None

    @property
    def has_linear_values(self) -> bool:
        """Whether `o` reads a sum of values as `qkv` makes them."""
        return self.gate is None and self.latent is None and self.clip is None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def split_sizes(self) -> tuple[int, int, int]:
        """Channels of each part of what `qkv` makes."""
        if self.latent is None:
            return self.q_size, self.kv_size, self.kv_size
        narrow, rotating = self.latent.kv.num_inputs, self.head_dim - self.latent.still_dim
        return self.qkv.num_outputs - narrow - rotating, narrow, rotating

    @property
    def linears(self) -> tuple[Linear, ...]:
        latent = () if self.latent is None else self.latent.linears
        gate = () if self.gate is None else (self.gate,)
        return self.qkv, *latent, *gate, self.o

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = tuple(norm for norm in (self.q_norm, self.k_norm) if norm is not None)
        return own if self.latent is None else (*own, *self.latent.norms)

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        return {} if self.sinks is None else {self.sinks: (self.num_heads,)}

    @property
    def states(self) -> tuple["State", ...]:
        return ()


class State(NamedTuple):
    """What a recurrence knows of all tokens so far: one float32 tensor for each slot, zero before the first token.

    kind: distinguishes the states of a block, as `k` and `v` do in a KV cache; shape: of one slot's
    """

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """A causal convolution of each channel for itself: out[t] = bias + sum of weight[j] * x[t - width + 1 + j].

    name: of its tensors, without `.weight` and `.bias`; the checkpoint's weight is `[size, 1, width]`
    """

    name: str
    size: int
    width: int
    has_bias: bool = False

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        bias = {f"{self.name}.bias": (self.size,)} if self.has_bias else {}
        return {f"{self.name}.weight": (self.size, 1, self.width), **bias}

    @property
    def state(self) -> State:
        """The last inputs, which the next tokens still read: `[width - 1, size]`, the oldest first."""
        return State("conv", (self.width - 1, self.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv:
    """LFM2's gated short convolution: out(c * conv(b * x)); b, c and x are the outputs of `into`, in this order."""

    into: Linear
    out: Linear
    conv: Convolution

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.into, self.out

    @property
    def norms(self) -> tuple[Norm, ...]:
        return ()

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        return self.conv.tensors

    @property
    def states(self) -> tuple[State, ...]:
        return (self.conv.state,)


class RecurrentHeads(NamedTuple):
    """Heads of a linear recurrence. Value heads that follow each other share a key head, which k and q have alike.

    Each value head has a state S `[v_dim, k_dim]`, to which each token adds a product of a vector of v_dim and of k.
    """

    num_k_heads: int
    num_v_heads: int
    k_dim: int
    v_dim: int

    @property
    def k_size(self) -> int:
        return self.num_k_heads * self.k_dim

    @property
    def v_size(self) -> int:
        return self.num_v_heads * self.v_dim

    @property
    def state(self) -> State:
        """S of each value head."""
        return State("heads", (self.num_v_heads, self.v_dim, self.k_dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta:
    """A gated delta rule (arXiv:2412.06464). For each token

        S = exp(decay) * S;  S += beta * (v - S k) k^T;  out = S q

    with beta = sigmoid(b) and decay = -exp(a_log) * softplus(a + dt_bias). q, k and v are silu(conv(...)), q and k of
    length 1, and q divided by sqrt(k_dim). The input of `out` is norm(out) * silu(z), with the norm over each head.

    into: q, k, v and z stacked in this order; gates: b and a
    a_log, dt_bias: names of tensors `[num_v_heads]`
    """

    into: Linear
    gates: Linear
    out: Linear
    conv: Convolution
    norm: Norm
    a_log: str
    dt_bias: str
    heads: RecurrentHeads

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.into, self.gates, self.out

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        shape = (self.heads.num_v_heads,)
        return {**self.conv.tensors, self.a_log: shape, self.dt_bias: shape}

    @property
    def states(self) -> tuple[State, ...]:
        return self.conv.state, self.heads.state


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """A selective state space, Mamba 2 (arXiv:2405.21060). For each token

        S = exp(-exp(a_log) * dt) * S + dt * v k^T;  out = S q + d * v

    with dt = softplus(gates + dt_bias), no less and no more than `dt_limits`. v, k and q, there called x, B and C, are
    silu(conv(...)). The input of `out` is norm(out * silu(z)), with the norm over all heads, or without a norm.

    into: z, v, k and q stacked in this order
    a_log, d, dt_bias: names of tensors `[num_v_heads]`
    """

    into: Linear
    gates: Linear
    out: Linear
    conv: Convolution
    norm: Norm | None
    a_log: str
    d: str
    dt_bias: str
    heads: RecurrentHeads
    dt_limits: tuple[float, float] = (0.0, math.inf)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.into, self.gates, self.out

    @property
    def norms(self) -> tuple[Norm, ...]:
        return () if self.norm is None else (self.norm,)

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        shape = (self.heads.num_v_heads,)
        return {**self.conv.tensors, self.a_log: shape, self.d: shape, self.dt_bias: shape}

    @property
    def states(self) -> tuple[State, ...]:
        return self.conv.state, self.heads.state


Mixer: TypeAlias = Attention | ShortConv | GatedDelta | Mamba2
"""What stands in a block's first half. Each kind has

    linears   its linear layers, in the order in which they run
    norms     its norms
    tensors   names and shapes of what else it reads from the checkpoint
    states    its states; none in attention
"""
