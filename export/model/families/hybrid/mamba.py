"""Bamba: Mamba 2, with attention in some layers; and what other families with Mamba 2 share."""

import math
from collections.abc import Mapping

from export.checkpoint.config_fields import shown
from export.checkpoint.fused import Split
from export.model.description import Convolution, Mamba2, Norm, RecurrentHeads
from export.model.families.config_values import flag, integer
from export.model.families.hybrid.layer_kinds import layer_kinds
from export.model.families.row import Architecture, BlockParts, Defaults, Names, Raw, Sizes, Style
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_DEFAULTS = Defaults(
    vocab_size=128_000,
    intermediate_size=14_336,
    num_kv_heads=8,
    max_position_embeddings=262_144,
    norm_eps=1e-5,
)

MAMBA_FIELDS: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv"), ()),
    **dict.fromkeys(("mamba_expand", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit"), ()),
    # How many tokens transformers computes together.
    "mamba_chunk_size": (),
}


def mamba_heads(raw: Raw, sizes: Sizes) -> RecurrentHeads:
    """Heads of Mamba 2, checked against each other. UnsupportedModel for several groups, whose norms are separate."""
    inner, num_heads = integer(raw, "mamba_expand", 2) * sizes.hidden_size, integer(raw, "mamba_n_heads", 128)
    groups = integer(raw, "mamba_n_groups", 1)
    if groups != 1:
        raise UnsupportedModel(f"config.json: mamba_n_groups {groups} is not supported; supported: 1")
    size = raw.get("mamba_d_head", "auto")
    head_dim = inner // num_heads if size in ("auto", None) else integer(raw, "mamba_d_head", 0)
    if num_heads * head_dim != inner:
        raise InvalidCheckpoint(
            f"config.json: mamba_n_heads {num_heads} of mamba_d_head {shown(size)} are not the {inner} channels of "
            "mamba_expand * hidden_size"
        )
    return RecurrentHeads(groups, num_heads, integer(raw, "mamba_d_state", 256), head_dim)


def mamba(raw: Raw, sizes: Sizes, parts: BlockParts) -> Mamba2:
    """The mixer of a block. Its `in_proj` is split by `mamba_splits`."""
    heads, hidden = mamba_heads(raw, sizes), sizes.hidden_size
    name, mixed = f"{parts.prefix}.mamba", heads.v_size + 2 * heads.k_size
    has_bias, reads = flag(raw, "mamba_proj_bias"), parts.reads
    into = [(f"{name}.in_proj.z", heads.v_size), (f"{name}.in_proj.xbc", mixed)]
    gates = [(f"{name}.in_proj.dt", heads.num_v_heads)]
    return Mamba2(
        into=parts.linear("mix_in", into, hidden, has_bias=has_bias, reads=reads),
        gates=parts.linear("router.mix", gates, hidden, has_bias=has_bias, reads=reads),
        out=parts.linear("mix_out", [(f"{name}.out_proj", hidden)], heads.v_size, has_bias=has_bias),
        conv=Convolution(
            name=f"{name}.conv1d",
            size=mixed,
            width=integer(raw, "mamba_d_conv", 4, minimum=2, maximum=16),
            has_bias=flag(raw, "mamba_conv_bias", default=True),
        ),
        norm=Norm(name=f"{name}.norm", size=heads.v_size, epsilon=sizes.norm_eps),
        a_log=f"{name}.A_log",
        d=f"{name}.D",
        dt_bias=f"{name}.dt_bias",
        heads=heads,
        dt_limits=_dt_limits(raw),
    )


def mamba_splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    """z, the inputs of the convolution, and dt."""
    heads = mamba_heads(raw, sizes)
    widths = {"z": heads.v_size, "xbc": heads.v_size + 2 * heads.k_size, "dt": heads.num_v_heads}
    return (Split("mamba.in_proj", tuple((f"mamba.in_proj.{part}", width) for part, width in widths.items())),)


def _dt_limits(raw: Raw) -> tuple[float, float]:
    limits = raw.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    if not (
        isinstance(limits, list)
        and len(limits) == 2
        and all(isinstance(limit, int | float) and not isinstance(limit, bool) for limit in limits)
        and limits[0] <= limits[1]
    ):
        raise InvalidCheckpoint(f"config.json: time_step_limit must be two numbers in order, got {shown(limits)}")
    return float(limits[0]), float(limits[1])


def _bamba(raw: Raw, sizes: Sizes) -> Style:
    listed = raw.get("attn_layer_indices") or []
    kinds = layer_kinds(raw, sizes, "linear_attention", default=lambda layer: layer in listed)
    bias = flag(raw, "attention_bias")
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(raw, "mlp_bias"),
        rotary_dim=sizes.head_dim // 2,
        mixers=tuple(None if kind == "full_attention" else lambda parts: mamba(raw, sizes, parts) for kind in kinds),
    )


BAMBA = Architecture(
    class_name="BambaForCausalLM",
    style=_bamba,
    defaults=_DEFAULTS,
    names=Names(
        final_norm="model.final_layernorm",
        mlp_norm="pre_ff_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        down="feed_forward.down_proj",
    ),
    splits=mamba_splits,
    fields={
        **MAMBA_FIELDS,
        **dict.fromkeys(("attn_layer_indices", "attention_bias", "mlp_bias"), ()),
        # transformers takes half of the channels of a head whatever config.json says.
        **dict.fromkeys(("partial_rotary_factor", "attn_rotary_emb"), ()),
        **dict.fromkeys(("num_logits_to_keep", "z_loss_coefficient", "layers_block_type"), ()),
    },
)
