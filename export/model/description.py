"""Describes a decoder: its blocks, norms and linear layers. All stages of an export read this one description.

families/ makes a `ModelConfig` from config.json. walker.py runs it over any set of operations, ONNX or numpy.
Quantization, memory plans and the tensor check read it too. No other code knows a family's tensor names or how its
layers are connected. Reads no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

LM_HEAD = "lm_head"


class Site(NamedTuple):
    """The place of a linear layer: decoder layer and kind. For statistics, also `k` and `v` of the KV cache."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


class NormKind(Enum):
    """Root mean square norm (arXiv:1910.07467), or layer norm (arXiv:1607.06450)."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over the last axis.

    name: of its tensors, without `.weight` and `.bias`; size: number of channels
    adds_one: the checkpoint stores w, and the model multiplies by 1 + w
    """

    name: str
    size: int
    epsilon: float
    kind: NormKind = NormKind.RMS
    has_bias: bool = False
    adds_one: bool = False


class Part(NamedTuple):
    """One matrix of the checkpoint, `[num_rows, num_inputs]`; `name` is without `.weight`."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix product, `[N, K]` with N outputs. Matrices of the checkpoint with the same input are stacked.

    site.kind: unique in a block; role: qkv, o, gate_up, up, down, router or lm_head, schemes choose a form by it
    reads: the norm whose output is its input; None if the input comes from attention or from the activation
    writes_stream: whether its output is added to the residual stream
    """

    site: Site
    role: str
    parts: tuple[Part, ...]
    num_inputs: int
    has_bias: bool = False
    reads: Norm | None = None
    writes_stream: bool = False

    @property
    def num_outputs(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """`[N, K]`."""
        return self.num_outputs, self.num_inputs

    @property
    def is_quantizable(self) -> bool:
        """False for a router, which has few weights and chooses between experts."""
        return self.role != "router"

    @property
    def weight_names(self) -> list[str]:
        return [f"{part.name}.weight" for part in self.parts]

    @property
    def bias_names(self) -> list[str]:
        return [f"{part.name}.bias" for part in self.parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Frequencies of a rotary embedding, and how they are scaled for contexts beyond the trained length.

    kind: default | linear | llama3 | yarn | longrope. Only the fields of that kind are read.
    short_factors, long_factors: longrope's divisor of each frequency, for up to original_max_len tokens and for more
    is_long: whether long_factors apply, see `ModelConfig.for_length`
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
class Attention:
    """Causal attention of one block.

    qkv: queries, keys and values stacked in this order; o: the output projection
    scale: of the scores; None is 1 / sqrt(head_dim)
    softcap: scores become softcap * tanh(score / softcap)
    window: in tokens, including the token itself; None for no window
    q_norm, k_norm: norms over each head
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

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


class Activation(Enum):
    """An MLP's activation; GELU_TANH is the tanh approximation of GELU (`gelu_new`, `gelu_pytorch_tanh`)."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)) if gated, with gate and up stacked in `up`; otherwise down(act(up(x)))."""

    up: Linear
    down: Linear
    activation: Activation
    is_gated: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts: the router's top_k largest logits choose the experts, their softmax gives the weights."""

    router: Linear
    experts: tuple[Mlp, ...]
    top_k: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.router, *(linear for expert in self.experts for linear in expert.linears))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One decoder layer.

        sequential   x += norm_out(attention(norm_in(x)));  x += norm_out(mlp(norm_in(x)))
        parallel     x += attention(norm_in(x)) + mlp(norm_in(x))

    attention_norm, mlp_norm: before attention and MLP; a parallel block may have attention_norm for both
    attention_out_norm, mlp_out_norm: after attention and MLP, before the sum (sandwich norms)
    """

    attention: Attention
    mlp: Mlp | Experts
    attention_norm: Norm
    mlp_norm: Norm | None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    is_parallel: bool = False

    @property
    def layer(self) -> int:
        return self.attention.qkv.site.layer

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, in the order in which they run."""
        return self.attention.qkv, self.attention.o, *self.mlp.linears

    @property
    def norms(self) -> tuple[Norm, ...]:
        a = self.attention
        every = (
            self.attention_norm, a.q_norm, a.k_norm, self.attention_out_norm, self.mlp_norm, self.mlp_out_norm
        )  # fmt: skip
        return tuple(norm for norm in every if norm is not None)

    def linear(self, kind: str) -> Linear:
        """The linear layer of a kind; KeyError if the block has none."""
        for linear in self.linears:
            if linear.site.kind == kind:
                return linear
        raise KeyError(kind)

    def readers_of(self, norm: Norm) -> tuple[Linear, ...]:
        """The linear layers whose input is the norm's output."""
        return tuple(linear for linear in self.linears if linear.reads == norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token embeddings `[vocab_size, hidden]` times `scale`, plus learned `positions` `[num_positions, hidden]`."""

    name: str
    scale: float | None = None
    positions: str | None = None
    num_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The LM head. Its logits are multiplied by `scale`, then become softcap * tanh(logit / softcap)."""

    linear: Linear
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. Lengths in tokens, sizes in elements."""

    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Head
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def attention(self) -> Attention:
        """The first block's attention. All blocks have the same number and size of heads."""
        return self.blocks[0].attention

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @property
    def intermediate_size(self) -> int:
        """Inputs of the largest `down`."""
        return max(linear.num_inputs for linear in self.linears if linear.role == "down")

    @property
    def rope(self) -> RopeConfig | None:
        """The rotary embedding of the first block that has one."""
        return next((block.attention.rotary.rope for block in self.blocks if block.attention.rotary), None)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether embedding and LM head are one matrix."""
        return self.head.linear.parts[0].name == self.embedding.name

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, the LM head last."""
        return *(linear for block in self.blocks for linear in block.linears), self.head.linear

    @cached_property
    def by_site(self) -> dict[Site, Linear]:
        return {linear.site: linear for linear in self.linears}

    @property
    def norms(self) -> Iterator[Norm]:
        """All norms, the final one last."""
        for block in self.blocks:
            yield from block.norms
        yield self.final_norm

    def untied(self) -> "ModelConfig":
        """The same model with a separate LM head, called `lm_head`."""
        linear = replace(self.head.linear, parts=(Part(LM_HEAD, self.vocab_size),))
        return replace(self, head=replace(self.head, linear=linear))

    def for_length(self, max_len: int) -> "ModelConfig":
        """The same model for at most `max_len` tokens, which chooses one of longrope's two sets of frequencies.

        transformers chooses for every sequence; a KV cache needs one set, because its keys are rotated already.
        """
        rope = self.rope
        if rope is None or rope.kind != "longrope":
            return self
        chosen = replace(rope, is_long=max_len > rope.original_max_len)
        return replace(self, blocks=tuple(_with_rope(block, chosen) for block in self.blocks))

    def num_macs(self, site: Site) -> int:
        """Multiply-adds of a linear layer per token, averaged over all tokens for an expert."""
        linear = self.by_site[site]
        return int(linear.num_outputs * linear.num_inputs * self.share_of_tokens(site))

    def share_of_tokens(self, site: Site) -> float:
        """Share of all tokens that a layer computes: less than 1 for an expert."""
        if site.layer == self.num_layers:
            return 1.0
        mlp = self.blocks[site.layer].mlp
        if isinstance(mlp, Mlp) or not any(site == linear.site for expert in mlp.experts for linear in expert.linears):
            return 1.0
        return mlp.top_k / len(mlp.experts)


def _with_rope(block: Block, rope: RopeConfig) -> Block:
    attention = block.attention
    rotary = attention.rotary and replace(attention.rotary, rope=rope)
    return replace(block, attention=replace(attention, rotary=rotary))
