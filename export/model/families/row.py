"""What a row of the table of architectures holds: defaults, config fields, and how a family builds its blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from export.checkpoint.fused import Split
from export.model.description import Activation, NormKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """transformers' values for fields that a config.json leaves out.

    num_kv_heads, head_dim, intermediate_size: None is as many as heads, hidden_size / num_attention_heads, and
        4 * hidden_size
    window: of sliding_window
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
    eos_id: int | None = 2


class Sizes(NamedTuple):
    """Dimensions that every family has, read and checked against each other."""

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
    """The checkpoint's tensor names, without `.weight`. Those of a block stand below `block`.

    gate: with `up`, one of two matrices of a gated MLP; router, experts: of a mixture, {expert} the number of each
    """

    block: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = ""
    experts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a family's blocks differ from Llama's; see the classes of description.py for what each field means.

    rotary_dim: channels of a head that turn; None is all of them, and `has_rotary` False none
    windows: of each layer
    num_experts: 0 has one MLP a block
    """

    norm_kind: NormKind = NormKind.RMS
    norm_bias: bool = False
    norm_adds_one: bool = False
    is_parallel: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    is_gated: bool = True
    has_rotary: bool = True
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    embedding_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 0
    top_k: int = 0
    windows: tuple[int | None, ...] = ()


Raw = Mapping[str, Any]
"""config.json, its fields under the names that most families use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family.

    class_name: transformers' class for it
    style: from its config fields and sizes
    fields: config fields of this family beyond the shared ones, with the values that they may have; () is any
    aliases: fields that this family calls otherwise: its own name to the shared one
    rope_kinds: rotary settings that its code reads; () is all that are known
    splits: for checkpoints that fuse or transpose matrices, how the description's tensors lie in theirs, by layer
    """

    class_name: str
    style: Callable[[Raw, Sizes], Style]
    defaults: Defaults = field(default_factory=Defaults)
    names: Names = field(default_factory=Names)
    fields: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    rope_kinds: tuple[str, ...] = ()
    splits: Callable[[Sizes], tuple[Split, ...]] = lambda sizes: ()
