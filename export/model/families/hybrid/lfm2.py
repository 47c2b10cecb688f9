"""LFM2 and its mixture of experts: gated short convolutions, with attention in some layers."""

from collections.abc import Mapping
from dataclasses import replace

from export.model.description import Convolution, Mixer, ShortConv
from export.model.families.config_values import flag, integer, number
from export.model.families.experts.mixture import num_experts, top_k
from export.model.families.hybrid.layer_kinds import layer_kinds
from export.model.families.row import (
    Architecture,
    BlockParts,
    Defaults,
    MakeMixer,
    Mixture,
    Names,
    Raw,
    Sizes,
    Style,
)
from export.model.routing import Routing, Scores

_ANY: tuple[object, ...] = ()


def _mixers(raw: Raw, sizes: Sizes) -> tuple[MakeMixer | None, ...]:
    width, has_bias = integer(raw, "conv_L_cache", 3, minimum=2), flag(raw, "conv_bias")

    def short_conv(parts: BlockParts) -> Mixer:
        size, name = sizes.hidden_size, f"{parts.prefix}.conv"
        return ShortConv(
            into=parts.linear("mix_in", [(f"{name}.in_proj", 3 * size)], size, has_bias=has_bias, reads=parts.reads),
            out=parts.linear("mix_out", [(f"{name}.out_proj", size)], size, has_bias=has_bias),
            conv=Convolution(name=f"{name}.conv", size=size, width=width, has_bias=has_bias),
        )

    listed = raw.get("full_attn_idxs")
    kinds = layer_kinds(raw, sizes, "conv", default=lambda layer: listed is None or layer in listed)
    return tuple(short_conv if kind == "conv" else None for kind in kinds)


def _lfm2(raw: Raw, sizes: Sizes) -> Style:
    return Style(qk_norm=True, intermediate_size=_inner_size(raw, sizes), mixers=_mixers(raw, sizes))


def _lfm2_moe(raw: Raw, sizes: Sizes) -> Style:
    count = num_experts(raw, ["num_experts"], 32)
    routing = Routing(
        top_k=top_k(raw, 4, count),
        scores=Scores.SIGMOID,
        is_normalized=flag(raw, "norm_topk_prob", default=True),
        epsilon=1e-6,
        scale=number(raw, "routed_scaling_factor", 1.0),
    )
    mixture = Mixture(
        num_experts=count,
        intermediate_size=integer(raw, "moe_intermediate_size", 1792),
        routing=routing,
        has_choice_bias=flag(raw, "use_expert_bias", default=True),
        dense_layers=frozenset(range(integer(raw, "num_dense_layers", 2, minimum=0, maximum=sizes.num_layers))),
    )
    return Style(qk_norm=True, mixture=mixture, mixers=_mixers(raw, sizes))


def _inner_size(raw: Raw, sizes: Sizes) -> int:
    """Channels of the MLP: two thirds of what config.json says, rounded up, unless it says not to adjust them."""
    inner = integer(raw, "block_ff_dim", sizes.intermediate_size)
    if not flag(raw, "block_auto_adjust_ff_dim", default=True):
        return inner
    inner = int(2 * inner / 3)
    if raw.get("block_ffn_dim_multiplier", 1.0) is None:
        return inner
    multiple = integer(raw, "block_multiple_of", 256)
    return -(-int(number(raw, "block_ffn_dim_multiplier", 1.0) * inner) // multiple) * multiple


_DEFAULTS = Defaults(
    vocab_size=65_536,
    hidden_size=2560,
    intermediate_size=12_288,
    num_kv_heads=8,
    max_position_embeddings=128_000,
    norm_eps=1e-5,
    rope_theta=1_000_000.0,
    is_tied=True,
)
_NAMES = Names(
    final_norm="model.embedding_norm",
    attention_norm="operator_norm",
    mlp_norm="ffn_norm",
    o="self_attn.out_proj",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    router="feed_forward.gate",
    choice_bias="feed_forward.expert_bias",
    experts="feed_forward.experts.{expert}",
    expert_parts=("w1", "w3", "w2"),
)
_FIELDS: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("conv_L_cache", "conv_bias", "full_attn_idxs"), _ANY),
    **dict.fromkeys(("use_pos_enc", "tie_embedding"), (True,)),
}

LFM2 = Architecture(
    class_name="Lfm2ForCausalLM",
    style=_lfm2,
    defaults=_DEFAULTS,
    names=_NAMES,
    aliases={"norm_eps": "rms_norm_eps"},
    fields={
        **_FIELDS,
        **dict.fromkeys(("block_ff_dim", "block_multiple_of"), _ANY),
        **dict.fromkeys(("block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"), _ANY),
        "block_use_swiglu": (True,),
        # transformers reads none of these: copies of other fields, and how weights were made before training.
        **dict.fromkeys(("block_dim", "block_norm_eps", "conv_dim", "conv_dim_out", "num_heads", "theta"), _ANY),
        **dict.fromkeys(("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init"), _ANY),
        "conv_use_xavier_init": _ANY,
    },
)

LFM2_MOE = Architecture(
    class_name="Lfm2MoeForCausalLM",
    style=_lfm2_moe,
    defaults=replace(_DEFAULTS, hidden_size=2048, intermediate_size=7168),
    names=_NAMES,
    aliases={"norm_eps": "rms_norm_eps"},
    fields={
        **_FIELDS,
        **dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_dense_layers"), _ANY),
        **dict.fromkeys(("use_expert_bias", "routed_scaling_factor", "norm_topk_prob"), _ANY),
    },
)
