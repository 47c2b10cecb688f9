"""The dataclasses of a row in the table of architectures: defaults, sizes, tensor names, style, config fields."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from export.checkpoint.fused import Split
from export.model.description import Activation, Clamp, Linear, Mamba2, Mixer, Norm, NormKind
from export.model.families.window_ropes import WindowRope
from export.model.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """transformers' values for fields that are missing in config.json.

    num_kv_heads, head_dim, intermediate_size: None means num_attention_heads, hidden_size / num_attention_heads and
        4 * hidden_size
    window: default of sliding_window
    eos_id: where there are several, a null in config.json means them too
    """

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int | None = 11_008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    activation: str = "silu"
    window: int | None = None
    max_window_layers: int = 28
    is_tied: bool = False
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2


class Sizes(NamedTuple):
    """Dimensions that every family has, after they were checked against each other."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int
    norm_eps: float
    activation: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The checkpoint's tensor names, without `.weight`. Names of a block's tensors follow `block`.

    gate, up: the two matrices of a gated MLP
    router, choice_bias, experts, shared, shared_gate: of a mixture, {expert} is an expert's number
    expert_parts: gate, up and down of an expert and of the shared one
    """

    block: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens"
    positions: str = ""
    embedding_norm: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    attention_gate: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    choice_bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts.{expert}"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A family's mixture of experts; `Experts` and `Routing` explain the fields.

    intermediate_size: inner channels of an expert; shared_size: of the shared one, 0 for none
    dense_layers: layers that have an MLP instead
    """

    num_experts: int
    intermediate_size: int
    routing: Routing
    router_bias: bool = False
    expert_bias: bool = False
    clamp: Clamp | None = None
    has_choice_bias: bool = False
    shared_size: int = 0
    has_shared_gate: bool = False
    dense_layers: frozenset[int] = frozenset()


class BlockParts(Protocol):
    """What a mixer of one block is made of.

    prefix: of the block's tensors; reads: the norm whose output is the mixer's input
    """

    prefix: str
    reads: Norm

    def linear(
        self,
        kind: str,
        parts: Sequence[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool = False,
        reads: Norm | None = None,
    ) -> Linear:
        """A linear layer of matrices by name and number of rows; without `reads` it writes to the residual stream."""
        ...

    def norm(self, name: str, size: int) -> Norm: ...


MakeMixer = Callable[[BlockParts], Mixer]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """Of multi-head latent attention; `Latent` explains them. q_rank: of the queries' latent, None for none."""

    q_rank: int | None
    kv_rank: int
    still_dim: int
    rotating_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a family's blocks differ from Llama's; description.py explains the fields.

    qk_norm: whether there are norms over queries and keys; _is_whole: over all heads together; _is_rotated: behind the
        rotary embedding
    rotary_dim: channels of a head that rotate, None for all of them; has_rotary False: none; rotates: which layers do
    has_sinks: see `Attention.sinks`
    alibi, position_offset: see `Attention` and `Embedding`; names: where config.json changes those of the row
    windows: the window of each layer; mixture: None for a decoder without experts
    intermediate_size: of the MLP, if it is not that of config.json
    has_attention_gate: whether attention has `Attention.gate`
    mixers: for each layer what makes its mixer, None for attention; empty if all layers have attention
    beside: makes a second mixer for every layer
    """

    norm_kind: NormKind = NormKind.RMS
    norm_bias: bool = False
    norm_adds_one: bool = False
    norm_weight: bool = True
    is_parallel: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qkv_clip: float | None = None
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_is_whole: bool = False
    qk_norm_is_rotated: bool = False
    is_gated: bool = True
    has_rotary: bool = True
    rotates: tuple[bool, ...] = ()
    alibi: tuple[float, ...] = ()
    position_offset: int = 0
    names: Names | None = None
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    has_sinks: bool = False
    latent: LatentSizes | None = None
    mixture: Mixture | None = None
    windows: tuple[int | None, ...] = ()
    intermediate_size: int | None = None
    has_attention_gate: bool = False
    mixers: tuple[MakeMixer | None, ...] = ()
    beside: Callable[[BlockParts], Mamba2] | None = None


Raw = Mapping[str, Any]
"""config.json with shared field names (`Architecture.aliases`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family.

    class_name: its class in transformers
    prepared: config.json in the form that the other functions and fields mean
    style: makes the style from config fields and sizes
    fields: config fields that only some families have, with their supported values; () allows any value
    aliases: the family's own field names, and the shared name of each, which it does not read
    synonyms: further names of shared fields, which the family reads as well
    activations: what a hidden_act means for this family alone
    rope: the rotary settings of a config.json that has none
    rope_kinds: the rope types that its code in transformers reads; () is all but Hunyuan's own
    window_rope: where layers with a window have a rotary embedding of their own
    splits: how matrices are fused or transposed in the checkpoint's layers
    scales: constants by which tensors are multiplied, see `ScaledView`
    renames: parts of tensor names, between dots, and what they become before `splits` are looked for
    unused: a pattern for names of tensors that predict no next token, as transformers ignores them; "" for none
    """

    class_name: str
    style: Callable[[Raw, Sizes], Style]
    prepared: Callable[[Raw], Raw] = lambda raw: raw
    defaults: Defaults = field(default_factory=Defaults)
    names: Names = field(default_factory=Names)
    fields: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, Activation] = field(default_factory=dict)
    rope_kinds: tuple[str, ...] = ()
    rope: Mapping[str, object] = field(default_factory=dict)
    window_rope: WindowRope | None = None
    splits: Callable[[Raw, Sizes], tuple[Split, ...]] = lambda raw, sizes: ()
    scales: Callable[[Raw, Sizes], Mapping[str, float]] = lambda raw, sizes: {}
    renames: Mapping[str, str] = field(default_factory=dict)
    unused: Callable[[Raw, Sizes], str] = lambda raw, sizes: ""
