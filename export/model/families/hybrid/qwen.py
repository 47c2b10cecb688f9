"""Qwen3-Next and Qwen3.5's text model: gated delta rules, and in every fourth layer attention with gated heads."""

from collections.abc import Sequence
from dataclasses import replace

from export.checkpoint.fused import Split
from export.model.description import Convolution, GatedDelta, Mixer, Norm, RecurrentHeads
from export.model.families.config_values import flag, integer, share
from export.model.families.experts.qwen import MIXTURE_FIELDS, mixture_of
from export.model.families.hybrid.layer_kinds import layer_kinds
from export.model.families.row import Architecture, BlockParts, Defaults, Mixture, Names, Raw, Sizes, Style
from runtime.errors import InvalidCheckpoint

_QWEN3_5 = Defaults(
    vocab_size=248_320,
    intermediate_size=12_288,
    num_heads=16,
    num_kv_heads=4,
    head_dim=256,
    max_position_embeddings=32_768,
    bos_id=None,
    eos_id=None,
)


def _heads(raw: Raw) -> RecurrentHeads:
    k_heads, v_heads = integer(raw, "linear_num_key_heads", 16), integer(raw, "linear_num_value_heads", 32)
    if v_heads % k_heads:
        raise InvalidCheckpoint(
            f"config.json: linear_num_value_heads {v_heads} is not a multiple of linear_num_key_heads {k_heads}"
        )
    return RecurrentHeads(
        k_heads, v_heads, integer(raw, "linear_key_head_dim", 128), integer(raw, "linear_value_head_dim", 128)
    )


Projections = Sequence[tuple[str, int]]
"""Names and numbers of rows of matrices that are stacked."""


def _delta(raw: Raw, sizes: Sizes, parts: BlockParts, into: Projections, gates: Projections) -> Mixer:
    """into: of q, k, v and z; gates: of b and a. Names follow the mixer's."""
    heads = _heads(raw)
    name, hidden, values = f"{parts.prefix}.linear_attn", sizes.hidden_size, heads.v_size
    mixed = 2 * heads.k_size + values
    return GatedDelta(
        into=parts.linear("mix_in", _named(name, into), hidden, reads=parts.reads),
        gates=parts.linear("router.mix", _named(name, gates), hidden, reads=parts.reads),
        out=parts.linear("mix_out", [(f"{name}.out_proj", hidden)], values),
        conv=Convolution(
            name=f"{name}.conv1d", size=mixed, width=integer(raw, "linear_conv_kernel_dim", 4, minimum=2, maximum=16)
        ),
        # Unlike the other norms, it does not add 1 to its weight.
        norm=Norm(name=f"{name}.norm", size=heads.v_dim, epsilon=sizes.norm_eps),
        a_log=f"{name}.A_log",
        dt_bias=f"{name}.dt_bias",
        heads=heads,
    )


def _named(prefix: str, parts: Projections) -> list[tuple[str, int]]:
    return [(f"{prefix}.{name}", num_rows) for name, num_rows in parts]


def _style(raw: Raw, sizes: Sizes, into: Projections, gates: Projections, mixture: Mixture | None = None) -> Style:
    every = integer(raw, "full_attention_interval", 4)
    kinds = layer_kinds(raw, sizes, "linear_attention", default=lambda layer: (layer + 1) % every == 0)
    has_bias = flag(raw, "attention_bias")

    def delta(parts: BlockParts) -> Mixer:
        return _delta(raw, sizes, parts, into, gates)

    return Style(
        norm_adds_one=True,
        qk_norm=True,
        qkv_bias=has_bias,
        o_bias=has_bias,
        has_attention_gate=True,
        mixture=mixture,
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor", 0.25)),
        mixers=tuple(None if kind == "full_attention" else delta for kind in kinds),
    )


def _qwen3_5(raw: Raw, sizes: Sizes, mixture: Mixture | None = None) -> Style:
    heads = _heads(raw)
    into = [("in_proj_qkv", 2 * heads.k_size + heads.v_size), ("in_proj_z", heads.v_size)]
    return _style(raw, sizes, into, [("in_proj_b", heads.num_v_heads), ("in_proj_a", heads.num_v_heads)], mixture)


def _qwen3_5_moe(raw: Raw, sizes: Sizes) -> Style:
    shared = integer(raw, "shared_expert_intermediate_size", 512)
    mixture = mixture_of(raw, sizes, experts=256, chosen=8, inner=512, shared=shared, is_normalized=True)
    return _qwen3_5(raw, sizes, mixture)


def _next(raw: Raw, sizes: Sizes) -> Style:
    heads = _heads(raw)
    widths = (heads.k_size, heads.k_size, heads.v_size, heads.v_size)
    into = [(f"in_proj_qkvz.{part}", width) for part, width in zip("qkvz", widths, strict=True)]
    shared = integer(raw, "shared_expert_intermediate_size", 512)
    mixture = mixture_of(raw, sizes, experts=512, chosen=10, inner=512, shared=shared, is_normalized=True)
    return _style(raw, sizes, into, [(f"in_proj_ba.{part}", heads.num_v_heads) for part in "ba"], mixture)


def _next_splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    """Each key head has its rows of q, k, v and z, and of b and a, side by side."""
    k_heads, v_heads, k_dim, v_dim = _heads(raw)
    group = v_heads // k_heads
    widths = (k_dim, k_dim, group * v_dim, group * v_dim)
    qkvz = tuple((f"linear_attn.in_proj_qkvz.{part}", width) for part, width in zip("qkvz", widths, strict=True))
    ba = tuple((f"linear_attn.in_proj_ba.{part}", group) for part in "ba")
    return (
        *_splits(raw, sizes),
        Split("linear_attn.in_proj_qkvz", qkvz, groups=k_heads),
        Split("linear_attn.in_proj_ba", ba, groups=k_heads),
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    halves = (("self_attn.q_proj.query", sizes.head_dim), ("self_attn.q_proj.gate", sizes.head_dim))
    return (Split("self_attn.q_proj", halves, groups=sizes.num_heads),)


_NAMES = Names(
    qkv=("self_attn.q_proj.query", "self_attn.k_proj", "self_attn.v_proj"), attention_gate="self_attn.q_proj.gate"
)
_FIELDS = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "full_attention_interval", "partial_rotary_factor", "attention_bias",
)  # fmt: skip

QWEN3_5_TEXT = Architecture(
    class_name="Qwen3_5ForCausalLM",
    style=_qwen3_5,
    defaults=_QWEN3_5,
    names=_NAMES,
    splits=_splits,
    fields=dict.fromkeys(_FIELDS, ()),
)

QWEN3_5_MOE_TEXT = Architecture(
    class_name="Qwen3_5MoeForCausalLM",
    style=_qwen3_5_moe,
    defaults=replace(_QWEN3_5, hidden_size=2048, num_layers=40, num_kv_heads=2),
    names=_NAMES,
    splits=_splits,
    fields=dict.fromkeys((*_FIELDS, *MIXTURE_FIELDS, "shared_expert_intermediate_size"), ()),
)

QWEN3_NEXT = Architecture(
    class_name="Qwen3NextForCausalLM",
    style=_next,
    defaults=replace(
        _QWEN3_5, vocab_size=151_936, hidden_size=2048, intermediate_size=5632, num_layers=48, num_kv_heads=2
    ),
    names=_NAMES,
    splits=_next_splits,
    fields=dict.fromkeys((*_FIELDS, *MIXTURE_FIELDS, "shared_expert_intermediate_size"), ()),
)
