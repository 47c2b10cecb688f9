"""What a decoder is made of: its blocks, norms and linear layers, declared once and interpreted by every stage.

An architecture's row makes a `ModelConfig` from config.json (architectures.py). The walker (walker.py) runs it over any
set of operations: ONNX graphs and numpy. Quantization, memory plans and the check of a checkpoint's tensors read the
same description. Nothing else knows a family's tensor names or how its layers are connected. Reads no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

LM_HEAD = "lm_head"


class Site(NamedTuple):
    """Where a linear layer is: decoder layer and kind. Calibration also knows `k` and `v`, those of a layer's cache."""

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

    name: of its tensors, without `.weight` and `.bias`; size: elements of the weight
    adds_one: the checkpoint holds w and the model multiplies by 1 + w
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
    """One matrix product. Matrices of the checkpoint that read the same input are stacked: `[N, K]`, N outputs.

    site.kind: unique within a block; role: what it does (qkv, o, gate_up, up, down, router, lm_head), by which
        precisions choose
    reads: the norm whose output it multiplies, None where it reads attention's values or the MLP's activations
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
        """A router decides between experts with few weights: it stays as it is."""
        return self.role != "router"

    @property
    def weight_names(self) -> list[str]:
        return [f"{part.name}.weight" for part in self.parts]

    @property
    def bias_names(self) -> list[str]:
        return [f"{part.name}.bias" for part in self.parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency, and how it is stretched beyond the trained length.

    kind: default | linear | llama3 | yarn | longrope. Only the fields of that kind are read.
    short_factors, long_factors: longrope's divisor of each frequency, for models of up to original_max_len tokens and
        beyond; is_long: which of them, see `ModelConfig.for_length`
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

    dim: channels of each head's head_dim that turn, the first ones
    interleaved: pairs are neighbours (2i, 2i + 1); otherwise channel i turns with i + dim / 2
    """

    rope: RopeConfig
    head_dim: int
    dim: int
    interleaved: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all channels turn."""
        return self.dim == self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal attention of one block.

    qkv: queries, keys and values stacked in this order; o: the output projection
    scale: of the scores; None is 1 / sqrt(head_dim)
    softcap: scores become softcap * tanh(score / softcap)
    window: in tokens, the token itself included; None attends to everything
    q_norm, k_norm: over each head
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
    """Of an MLP; GELU_TANH is GELU in its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`)."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)) where it is gated: `up` is then gate and up stacked. Else down(act(up(x)))."""

    up: Linear
    down: Linear
    activation: Activation
    is_gated: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts: the router's top_k largest logits choose, their softmax weighs."""

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

    attention_norm, mlp_norm: in front; a parallel block without an mlp_norm feeds both from its attention_norm
    attention_out_norm, mlp_out_norm: behind, before the sum (sandwich norms); None where there is none
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
        """In the order they run."""
        return self.attention.qkv, self.attention.o, *self.mlp.linears

    @property
    def norms(self) -> tuple[Norm, ...]:
        a = self.attention
        every = (
            self.attention_norm, a.q_norm, a.k_norm, self.attention_out_norm, self.mlp_norm, self.mlp_out_norm
        )  # fmt: skip
        return tuple(norm for norm in every if norm is not None)

    def linear(self, kind: str) -> Linear:
        """The linear layer of that kind; KeyError if the block has none."""
        for linear in self.linears:
            if linear.site.kind == kind:
                return linear
        raise KeyError(kind)

    def readers_of(self, norm: Norm) -> tuple[Linear, ...]:
        """The linear layers that multiply a norm's output."""
        return tuple(linear for linear in self.linears if linear.reads == norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token embeddings `[vocab_size, hidden_size]`, times `scale`; plus learned positions `[num_positions, hidden]`."""

    name: str
    scale: float | None = None
    positions: str | None = None
    num_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The LM head, its logits times `scale`, then softcap * tanh(logit / softcap)."""

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
        """The first block's. Heads and their sizes are the same in all blocks: the KV cache is one array a layer."""
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
        """Inputs of the widest `down`."""
        return max(linear.num_inputs for linear in self.linears if linear.role == "down")

    @property
    def rope(self) -> RopeConfig | None:
        """Of the first block that has one."""
        return next((block.attention.rotary.rope for block in self.blocks if block.attention.rotary), None)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether embedding and LM head are one matrix."""
        return self.head.linear.parts[0].name == self.embedding.name

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All of them, the LM head last."""
        return *(linear for block in self.blocks for linear in block.linears), self.head.linear

    @cached_property
    def by_site(self) -> dict[Site, Linear]:
        return {linear.site: linear for linear in self.linears}

    @property
    def norms(self) -> Iterator[Norm]:
        """All of them, the final one last."""
        for block in self.blocks:
            yield from block.norms
        yield self.final_norm

    def untied(self) -> "ModelConfig":
        """The same with an LM head of its own, called `lm_head`."""
        linear = replace(self.head.linear, parts=(Part(LM_HEAD, self.vocab_size),))
        return replace(self, head=replace(self.head, linear=linear))

    def for_length(self, max_len: int) -> "ModelConfig":
        """The same for sequences of at most `max_len` tokens: longrope has two sets of frequencies, chosen once.

        transformers chooses anew for every sequence, but keys that are in a cache already stay as they were turned.
        """
        rope = self.rope
        if rope is None or rope.kind != "longrope":
            return self
        chosen = replace(rope, is_long=max_len > rope.original_max_len)
        return replace(self, blocks=tuple(_with_rope(block, chosen) for block in self.blocks))

    def num_macs(self, site: Site) -> int:
        """Multiply-adds of a linear layer a token; of one of many experts, its share of the tokens."""
        linear = self.by_site[site]
        return int(linear.num_outputs * linear.num_inputs * self.share_of_tokens(site))

    def share_of_tokens(self, site: Site) -> float:
        """Of all tokens, those that a layer multiplies: fewer than all for an expert."""
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
