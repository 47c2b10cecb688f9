"""Hunyuan V1: norms over queries and keys behind the rotary embedding, whose base is stretched by a fixed `alpha`."""

from export.model.families.config_values import flag
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style


def _style(raw: Raw, sizes: Sizes) -> Style:
    bias = flag(raw, "attention_bias")
    return Style(qkv_bias=bias, o_bias=bias, qk_norm=True, qk_norm_is_rotated=True)


HUNYUAN_V1_DENSE = Architecture(
    class_name="HunYuanDenseV1ForCausalLM",
    style=_style,
    defaults=Defaults(vocab_size=290_943, norm_eps=1e-5),
    names=Names(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm"),
    rope_kinds=("default", "ntk"),
    # The others belong to relatives with experts or images, or name tokens.
    fields={
        "attention_bias": (),
        "attention_head_dim": (),
        "use_qk_norm": (True,),
        "eod_token_id": (),
        "im_end_id": (),
        "im_newline_id": (),
        "im_start_id": (),
        "image_token_id": (),
        "text_start_id": (),
        "text_end_id": (),
        "mask_init_id": (),
        "sep_token_id": (),
        "pad_id": (),
        "org_vocab_size": (),
        "use_cla": (False,),
        "norm_type": ("rms", "hf_rms", "fused"),
    },
)
