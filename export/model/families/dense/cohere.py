"""Cohere's Command R: parallel attention and MLP after one layer norm without bias, interleaved rotary embedding."""

from export.model.description import NormKind
from export.model.families.config_values import flag, number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style


def _style(raw: Raw, sizes: Sizes) -> Style:
    bias = flag(raw, "attention_bias")
    return Style(
        norm_kind=NormKind.LAYER,
        is_parallel=True,
        qkv_bias=bias,
        o_bias=bias,
        rotary_interleaved=True,
        logit_scale=number(raw, "logit_scale", 0.0625),
    )


COHERE = Architecture(
    class_name="CohereForCausalLM",
    style=_style,
    defaults=Defaults(
        vocab_size=256_000,
        hidden_size=8192,
        intermediate_size=22_528,
        num_layers=40,
        num_heads=64,
        max_position_embeddings=8192,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        is_tied=True,
        bos_id=5,
        eos_id=255_001,
    ),
    names=Names(mlp_norm=""),
    aliases={"layer_norm_eps": "rms_norm_eps"},
    fields={"attention_bias": (), "logit_scale": ()},
)
