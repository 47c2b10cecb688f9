"""How tokens of a block reach each other: attention over keys and values; part of the description (description.py)."""

from dataclasses import dataclass
from typing import TypeAlias

from export.model.layers import Linear, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Frequencies of a rotary embedding, and how they are scaled for contexts beyond the trained length.

    kind: default | linear | llama3 | yarn | longrope. Only the fields of that kind are read.
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
    q_norm, k_norm: norms over each head
    latent: None if `qkv` makes queries, keys and values themselves
    sinks: name of a tensor `[num_heads]` of scores that take a share of each head's softmax and add no value
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
        return self.qkv, *(() if self.latent is None else self.latent.linears), self.o

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = tuple(norm for norm in (self.q_norm, self.k_norm) if norm is not None)
        return own if self.latent is None else (*own, *self.latent.norms)


Mixer: TypeAlias = Attention
"""What stands in a block's first half. Each kind has `linears`, in the order in which they run, and `norms`."""
