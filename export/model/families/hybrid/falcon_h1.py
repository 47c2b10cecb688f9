"""Falcon-H1: attention and Mamba 2 beside each other in every block, with constants that are folded into weights."""

from collections.abc import Mapping, Sequence

from export.checkpoint.config_fields import shown
from export.model.families.config_values import flag, number
from export.model.families.experts.mixture import refuse
from export.model.families.hybrid.mamba import MAMBA_FIELDS, mamba, mamba_splits
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from runtime.errors import InvalidCheckpoint

_MULTIPLIERS = (
    "key_multiplier", "attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
    "mlp_multipliers", "ssm_multipliers", "embedding_multiplier", "lm_head_multiplier",
)  # fmt: skip


def _style(raw: Raw, sizes: Sizes) -> Style:
    refuse(raw, "layer_types", "because all layers of the family are alike")
    bias = flag(raw, "attention_bias")
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(raw, "mlp_bias"),
        embedding_scale=number(raw, "embedding_multiplier", 1.0),
        logit_scale=number(raw, "lm_head_multiplier", 1.0),
        beside=lambda parts: mamba(raw, sizes, parts, out_bias=flag(raw, "projectors_bias"), has_norm=False),
    )


def _scales(raw: Raw, sizes: Sizes) -> Mapping[str, float]:
    """The inputs' constants multiply weights, the outputs' weights and biases."""
    attention_in, key = number(raw, "attention_in_multiplier", 1.0), number(raw, "key_multiplier", 1.0)
    gate, down = _numbers(raw, "mlp_multipliers", 2)
    z, x, b, c, dt = _numbers(raw, "ssm_multipliers", 5)
    inner, outer = number(raw, "ssm_in_multiplier", 1.0), number(raw, "ssm_out_multiplier", 1.0)
    inputs = {
        "self_attn.q_proj": attention_in,
        "self_attn.k_proj": attention_in,
        "self_attn.v_proj": attention_in,
        **{f"mamba.in_proj.{part}": inner for part in ("z", "x", "b", "c", "dt")},
    }
    outputs = {
        "self_attn.k_proj": key,
        "self_attn.o_proj": number(raw, "attention_out_multiplier", 1.0),
        "feed_forward.gate_proj": gate,
        "feed_forward.down_proj": down,
        "mamba.in_proj.z": z,
        "mamba.in_proj.x": x,
        "mamba.in_proj.b": b,
        "mamba.in_proj.c": c,
        "mamba.in_proj.dt": dt,
        "mamba.out_proj": outer,
    }
    names = {*inputs, *outputs}
    weights = {f"{name}.weight": inputs.get(name, 1.0) * outputs.get(name, 1.0) for name in names}
    return {**weights, **{f"{name}.bias": factor for name, factor in outputs.items()}}


def _numbers(raw: Raw, name: str, count: int) -> Sequence[float]:
    found = [1.0] * count if raw.get(name) is None else raw[name]
    if not isinstance(found, list) or len(found) != count:
        raise InvalidCheckpoint(f"config.json: {name} must be {count} numbers, got {shown(found)}")
    return [number({name: value}, name) for value in found]


FALCON_H1 = Architecture(
    class_name="FalconH1ForCausalLM",
    style=_style,
    defaults=Defaults(
        vocab_size=128_000,
        intermediate_size=14_336,
        num_kv_heads=8,
        max_position_embeddings=8192,
        norm_eps=1e-5,
    ),
    names=Names(
        final_norm="model.final_layernorm",
        mlp_norm="pre_ff_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        down="feed_forward.down_proj",
    ),
    splits=mamba_splits,
    scales=_scales,
    fields={
        **MAMBA_FIELDS,
        **dict.fromkeys((*_MULTIPLIERS, "attention_bias", "mlp_bias", "projectors_bias"), ()),
        # Without a norm its place does not matter.
        **dict.fromkeys(("mamba_d_ssm", "mamba_norm_before_gate", "num_logits_to_keep"), ()),
        "mamba_rms_norm": (False,),
    },
)
