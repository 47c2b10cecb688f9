"""Describes a decoder: its blocks, norms and linear layers. All stages of an export read this one description.

families/ makes a `ModelConfig` from config.json. walker.py runs it over any set of operations, ONNX or numpy.
Quantization, memory plans and the tensor check read it too. No other code knows a family's tensor names or how its
layers are connected. Its parts are in layers.py and mixers.py, and everybody imports them from here. Reads no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from export.model.layers import Linear, Norm, NormKind, Part, Site
from export.model.mixers import (
    Attention,
    Convolution,
    GatedDelta,
    Latent,
    Mamba2,
    Mixer,
    RecurrentHeads,
    RopeConfig,
    Rotary,
    ShortConv,
    State,
)
from export.model.routing import Routing

__all__ = [
    "LM_HEAD",
    "Activation",
    "Attention",
    "Block",
    "Clamp",
    "Convolution",
    "Embedding",
    "Experts",
    "GatedDelta",
    "Head",
    "Latent",
    "Linear",
    "Mamba2",
    "Mixer",
    "Mlp",
    "ModelConfig",
    "Norm",
    "NormKind",
    "Part",
    "RecurrentHeads",
    "RopeConfig",
    "Rotary",
    "ShortConv",
    "Site",
    "State",
]

LM_HEAD = "lm_head"


class Activation(Enum):
    """An MLP's activation; GELU_TANH is the tanh approximation of GELU, RELU2 the square of ReLU."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamp:
    """A gated activation within limits: (clip(up) + 1) * min(gate, limit) * sigmoid(alpha * min(gate, limit)).

    clip: to -limit .. limit
    """

    limit: float
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)) if gated, with gate and up stacked in `up`; otherwise down(act(up(x))).

    clamp: takes the place of act(gate) * up
    """

    up: Linear
    down: Linear
    activation: Activation
    is_gated: bool
    clamp: Clamp | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts: each token's weighted sum of the experts that the router chose for it.

    choice_bias: name of a tensor `[experts]` that is added to the scores for choosing, and not for weighing
    shared: an MLP for all tokens, added to the sum; shared_gate: a logit for each token, whose sigmoid multiplies it
    """

    router: Linear
    experts: tuple[Mlp, ...]
    routing: Routing
    choice_bias: str | None = None
    shared: Mlp | None = None
    shared_gate: Linear | None = None

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        """The experts, and the shared one last."""
        return self.experts if self.shared is None else (*self.experts, self.shared)

    @property
    def linears(self) -> tuple[Linear, ...]:
        gate = () if self.shared_gate is None else (self.shared_gate,)
        return (self.router, *(linear for mlp in self.mlps for linear in mlp.linears), *gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One decoder layer.

        sequential   x += norm_out(attention(norm_in(x)));  x += norm_out(mlp(norm_in(x)))
        parallel     x += attention(norm_in(x)) + mlp(norm_in(x))

    mixer: attention, or what stands in its place in the formulas above
    beside: another mixer with the same input, whose output is added to that of `mixer`
    attention_norm, mlp_norm: before attention and MLP; a parallel block may have attention_norm for both
    attention_out_norm, mlp_out_norm: after attention and MLP, before the sum; with the other two (sandwich norms) or
        in their place
    residual_scale: multiplies what attention and MLP add to the stream
    """

    mixer: Mixer
    mlp: Mlp | Experts
    beside: Mamba2 | None = None
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    is_parallel: bool = False
    residual_scale: float | None = None

    @property
    def layer(self) -> int:
        return self.mixer.linears[0].site.layer

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        return (self.mixer,) if self.beside is None else (self.mixer, self.beside)

    @property
    def states(self) -> tuple[State, ...]:
        """What slots hold for it beside K and V."""
        return tuple(state for mixer in self.mixers for state in mixer.states)

    @property
    def attention(self) -> Attention:
        """Its mixer, in a block that has attention."""
        assert isinstance(self.mixer, Attention), f"layer {self.layer} has no attention"
        return self.mixer

    @property
    def has_attention(self) -> bool:
        return isinstance(self.mixer, Attention)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, in the order in which they run."""
        return *(linear for mixer in self.mixers for linear in mixer.linears), *self.mlp.linears

    @property
    def norms(self) -> tuple[Norm, ...]:
        behind = (self.attention_out_norm, self.mlp_norm, self.mlp_out_norm)
        inside = (norm for mixer in self.mixers for norm in mixer.norms)
        return tuple(norm for norm in (self.attention_norm, *inside, *behind) if norm is not None)

    @property
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the MLP's tensors that belong to no linear layer. The mixer has `tensors` of its own."""
        if isinstance(self.mlp, Mlp) or self.mlp.choice_bias is None:
            return {}
        return {self.mlp.choice_bias: (len(self.mlp.experts),)}

    def without_rotary(self) -> "Block":
        """The same block for attention whose queries and keys are rotated already."""
        return replace(self, mixer=replace(self.attention, rotary=None))

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
    """Token embeddings `[vocab_size, hidden]` times `scale`, plus learned `positions` `[num_positions, hidden]`.

    position_offset: row of the first position; norm: behind the sum
    """

    name: str
    scale: float | None = None
    positions: str | None = None
    num_positions: int = 0
    position_offset: int = 0
    norm: Norm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The LM head. Its logits are multiplied by `scale`, then become softcap * tanh(logit / softcap)."""

    linear: Linear
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. Lengths in tokens, sizes in elements.

    unused: a pattern for names of the checkpoint's tensors that are for something else than the next token
    """

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
    unused: str = ""

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def attention(self) -> Attention:
        """The first attention. All blocks that have one have the same number and size of heads."""
        return self.attention_blocks[0].attention

    @cached_property
    def attention_blocks(self) -> tuple[Block, ...]:
        """The blocks with attention, which alone have K and V."""
        return tuple(block for block in self.blocks if block.has_attention)

    @property
    def has_states(self) -> bool:
        """Whether slots hold states beside K and V."""
        return any(block.states for block in self.blocks)

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
    def rotaries(self) -> tuple[Rotary, ...]:
        """The different rotary embeddings of the blocks."""
        found = dict.fromkeys(block.attention.rotary for block in self.attention_blocks)
        return tuple(rotary for rotary in found if rotary is not None)

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
        if self.embedding.norm is not None:
            yield self.embedding.norm
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
        return replace(self, blocks=tuple(_for_length(block, max_len) for block in self.blocks))

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices and of the embedding; one that is the LM head too counts once."""
        table = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return table + sum(linear.num_outputs * linear.num_inputs for linear in self.linears)

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
        return mlp.routing.top_k / len(mlp.experts)


def _for_length(block: Block, max_len: int) -> Block:
    rotary = block.attention.rotary if block.has_attention else None
    if rotary is None or rotary.rope.kind != "longrope":
        return block
    rope = replace(rotary.rope, is_long=max_len > rotary.rope.original_max_len)
    return replace(block, mixer=replace(block.attention, rotary=replace(rotary, rope=rope)))
