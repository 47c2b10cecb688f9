"""Gemma: norms that multiply by 1 + w, and scaled embeddings.

Gemma 2 has norms before and after attention and MLP, windows, and softcaps of scores and logits.
"""

import math
from dataclasses import replace

from export.model.description import Activation
from export.model.families.config_values import flag, optional_number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from export.model.families.windows import windows

_DEFAULTS = Defaults(
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    max_position_embeddings=8192,
    activation="gelu_pytorch_tanh",
    window=4096,
    is_tied=True,
    bos_id=2,
    eos_id=1,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    """Gemma 2 (arXiv:2408.00118) scales scores by query_pre_attn_scalar instead of head_dim."""

    def cap(name: str, default: float) -> float | None:
        return optional_number(raw, name) if name in raw else default

    bias = flag(raw, "attention_bias")
    return Style(
        norm_adds_one=True,
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=(optional_number(raw, "query_pre_attn_scalar") or 256) ** -0.5,
        attention_softcap=cap("attn_logit_softcapping", 50.0),
        embedding_scale=math.sqrt(sizes.hidden_size),
        logit_softcap=cap("final_logit_softcapping", 30.0),
        windows=windows(raw, "alternating", sizes, _DEFAULTS),
    )


GEMMA2 = Architecture(
    class_name="Gemma2ForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    names=Names(
        attention_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
    ),
    # Some releases of transformers wrote both names, and used hidden_activation.
    aliases={"hidden_activation": "hidden_act"},
    fields={
        "attention_bias": (),
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
        "query_pre_attn_scalar": (),
    },
)


def _gemma(raw: Raw, sizes: Sizes) -> Style:
    bias = flag(raw, "attention_bias")
    return Style(norm_adds_one=True, qkv_bias=bias, o_bias=bias, embedding_scale=math.sqrt(sizes.hidden_size))


GEMMA = Architecture(
    class_name="GemmaForCausalLM",
    style=_gemma,
    defaults=replace(
        _DEFAULTS,
        hidden_size=3072,
        intermediate_size=24_576,
        num_layers=28,
        num_heads=16,
        num_kv_heads=16,
        window=None,
    ),
    # The first files say "gelu" and mean its approximation, as transformers reads them.
    activations={"gelu": Activation.GELU_TANH},
    fields={"attention_bias": (), "hidden_activation": ("gelu_pytorch_tanh",)},
)
