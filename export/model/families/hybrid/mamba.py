"""Bamba: Mamba 2, with attention in some layers; and what other families with Mamba 2 share."""

import math
from collections.abc import Mapping

from export.checkpoint.config_fields import shown
from export.checkpoint.fused import Split
from export.model.description import Convolution, Mamba2, Norm, RecurrentHeads
from export.model.families.config_values import flag, integer
from export.model.families.experts.mixture import refuse
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
    """Heads of Mamba 2, checked against each other."""
    inner, num_heads = integer(raw, "mamba_expand", 2) * sizes.hidden_size, integer(raw, "mamba_n_heads", 128)
    if "mamba_d_ssm" in raw:
        inner = integer(raw, "mamba_d_ssm", 0)
    groups = integer(raw, "mamba_n_groups", 1)
    if num_heads % groups:
        raise InvalidCheckpoint(f"config.json: mamba_n_heads {num_heads} is not a multiple of mamba_n_groups {groups}")
    size = raw.get("mamba_d_head", "auto")
    head_dim = inner // num_heads if size in ("auto", None) else integer(raw, "mamba_d_head", 0)
    if num_heads * head_dim != inner:
        raise InvalidCheckpoint(
            f"config.json: mamba_n_heads {num_heads} of mamba_d_head {shown(size)} are not the {inner} channels of "
            "mamba_d_ssm, or of mamba_expand * hidden_size"
        )
    return RecurrentHeads(groups, num_heads, integer(raw, "mamba_d_state", 256), head_dim)


def mamba(raw: Raw, sizes: Sizes, parts: BlockParts, *, out_bias: bool | None = None, has_norm: bool = True) -> Mamba2:
    """The mixer of a block. Its `in_proj` is split by `mamba_splits`. out_bias: None is the same as `in_proj`

    UnsupportedModel for a norm with several groups, because each group has a norm of its own.
    """
    heads, hidden = mamba_heads(raw, sizes), sizes.hidden_size
    name, mixed = f"{parts.prefix}.mamba", heads.v_size + 2 * heads.k_size
    has_bias, reads = flag(raw, "mamba_proj_bias"), parts.reads
    if has_norm and heads.num_k_heads != 1:
        raise UnsupportedModel(f"config.json: mamba_n_groups {heads.num_k_heads} is not supported; supported: 1")
    out_bias, widths = has_bias if out_bias is None else out_bias, _widths(heads)
    into = [(f"{name}.in_proj.{part}", widths[part]) for part in ("z", "x", "b", "c")]
    gates = [(f"{name}.in_proj.dt", heads.num_v_heads)]
    return Mamba2(
        into=parts.linear("mix_in", into, hidden, has_bias=has_bias, reads=reads),
        gates=parts.linear("router.mix", gates, hidden, has_bias=has_bias, reads=reads),
        out=parts.linear(
            "mix_out", [(f"{name}.out_proj", hidden)], heads.v_size, has_bias=has_bias if out_bias is None else out_bias
        ),
        conv=Convolution(
            name=f"{name}.conv1d",
            size=mixed,
            width=integer(raw, "mamba_d_conv", 4, minimum=2, maximum=16),
            has_bias=flag(raw, "mamba_conv_bias", default=True),
        ),
        norm=Norm(name=f"{name}.norm", size=heads.v_size, epsilon=sizes.norm_eps) if has_norm else None,
        a_log=f"{name}.A_log",
        d=f"{name}.D",
        dt_bias=f"{name}.dt_bias",
        heads=heads,
        dt_limits=_dt_limits(raw),
    )


def mamba_splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    """z, the inputs of the convolution, and dt."""
    widths = _widths(mamba_heads(raw, sizes))
    return (Split("mamba.in_proj", tuple((f"mamba.in_proj.{part}", width) for part, width in widths.items())),)


def _widths(heads: RecurrentHeads) -> Mapping[str, int]:
    """Outputs of `in_proj`, by what they are called in the paper."""
    return {"z": heads.v_size, "x": heads.v_size, "b": heads.k_size, "c": heads.k_size, "dt": heads.num_v_heads}


def _dt_limits(raw: Raw) -> tuple[float, float]:
    limits = raw.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    # transformers 5 writes infinity in this way.
    listed = limits if isinstance(limits, list) else []
    plain = [math.inf if limit == {"__float__": "Infinity"} else limit for limit in listed]
    is_valid = len(plain) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in plain)
    if not is_valid or not plain[0] <= plain[1]:
        raise InvalidCheckpoint(f"config.json: time_step_limit must be two numbers in order, got {shown(limits)}")
    return float(plain[0]), float(plain[1])


def _bamba(raw: Raw, sizes: Sizes) -> Style:
    refuse(raw, "layer_types", "because the family reads attn_layer_indices instead")
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
