"""GLM and GLM-4-0414: interleaved rotary embedding of half of a head, fused gate and up; GLM-4 has sandwich norms."""

from export.checkpoint.fused import Split
from export.model.families.config_values import flag, share
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style

_DEFAULTS = Defaults(
    vocab_size=151_552,
    intermediate_size=13_696,
    num_layers=40,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=131_072,
    norm_eps=1.5625e-07,
    bos_id=None,
    eos_id=(151_329, 151_336, 151_338),
)
_FIELDS: dict[str, tuple[object, ...]] = {"attention_bias": (), "partial_rotary_factor": ()}


def _style(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        qkv_bias=flag(raw, "attention_bias", default=True),
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor", 0.5)),
        rotary_interleaved=True,
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    return (Split("mlp.gate_up_proj", (("mlp.gate_proj", None), ("mlp.up_proj", None))),)


GLM = Architecture(class_name="GlmForCausalLM", style=_style, defaults=_DEFAULTS, splits=_splits, fields=_FIELDS)

GLM4 = Architecture(
    class_name="Glm4ForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    names=Names(attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm"),
    splits=_splits,
    fields=_FIELDS,
)
