"""Cohere's Command R: parallel attention and MLP after one layer norm without bias, interleaved rotary embedding.

In Command R7B and Command A (cohere2), three of four layers have a window, and only these rotate.
"""

from dataclasses import replace

from export.model.description import NormKind
from export.model.families.config_values import flag, number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from export.model.families.windows import windows

_DEFAULTS = Defaults(
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
)


def _style(raw: Raw, sizes: Sizes, *, by_layer: tuple[int | None, ...] = ()) -> Style:
    bias = flag(raw, "attention_bias")
    return Style(
        norm_kind=NormKind.LAYER,
        is_parallel=True,
        qkv_bias=bias,
        o_bias=bias,
        rotary_interleaved=True,
        logit_scale=number(raw, "logit_scale", 0.0625),
        rotates=tuple(window is not None for window in by_layer),
        windows=by_layer,
    )


COHERE = Architecture(
    class_name="CohereForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    names=Names(mlp_norm=""),
    aliases={"layer_norm_eps": "rms_norm_eps"},
    fields={"attention_bias": (), "logit_scale": ()},
)


_COHERE2 = replace(_DEFAULTS, rope_theta=10_000.0, window=4096)


def _cohere2(raw: Raw, sizes: Sizes) -> Style:
    return _style(raw, sizes, by_layer=windows(raw, "patterned", sizes, _COHERE2, pattern=4))


COHERE2 = Architecture(
    class_name="Cohere2ForCausalLM",
    style=_cohere2,
    defaults=_COHERE2,
    names=Names(mlp_norm=""),
    aliases={"layer_norm_eps": "rms_norm_eps"},
    fields={
        "attention_bias": (),
        "logit_scale": (),
        "sliding_window_pattern": (),
        "use_parallel_block": (True,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1,),
        "order_of_interleaved_layers": ("local_attn_first",),
    },
)
