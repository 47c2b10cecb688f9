"""Gemma: norms that multiply by 1 + w, and scaled embeddings.

Gemma 2 has norms before and after attention and MLP, windows, and softcaps of scores and logits. Gemma 3 has norms over
queries and keys instead of the softcaps, and layers with a window have a rotary embedding of their own.
"""

import math
from dataclasses import replace

from export.model.description import Activation
from export.model.families.config_values import flag, optional_number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from export.model.families.window_ropes import WindowRope
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


_FIELDS: dict[str, tuple[object, ...]] = {
    "attention_bias": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
}
# Some releases of transformers wrote both names, and used hidden_activation.
_ALIASES = {"hidden_activation": "hidden_act"}
_SANDWICH = Names(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def _style(raw: Raw, sizes: Sizes, *, pattern: int, caps: tuple[float | None, float | None], qk_norm: bool) -> Style:
    """Scores are scaled by query_pre_attn_scalar instead of head_dim. caps: defaults of scores and of logits."""

    def cap(name: str, default: float | None) -> float | None:
        return optional_number(raw, name) if name in raw else default

    bias = flag(raw, "attention_bias")
    return Style(
        norm_adds_one=True,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=qk_norm,
        attention_scale=(optional_number(raw, "query_pre_attn_scalar") or 256) ** -0.5,
        attention_softcap=cap("attn_logit_softcapping", caps[0]),
        embedding_scale=math.sqrt(sizes.hidden_size),
        logit_softcap=cap("final_logit_softcapping", caps[1]),
        windows=windows(raw, "patterned", sizes, _DEFAULTS, pattern=pattern),
    )


def _gemma2(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2408.00118."""
    return _style(raw, sizes, pattern=2, caps=(50.0, 30.0), qk_norm=False)


def _gemma3(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2503.19786."""
    return _style(raw, sizes, pattern=6, caps=(None, None), qk_norm=True)


GEMMA2 = Architecture(
    class_name="Gemma2ForCausalLM",
    style=_gemma2,
    defaults=_DEFAULTS,
    names=_SANDWICH,
    aliases=_ALIASES,
    fields=_FIELDS,
)

VAULTGEMMA = Architecture(
    class_name="VaultGemmaForCausalLM",
    style=_gemma2,
    defaults=_DEFAULTS,
    names=Names(mlp_norm="pre_feedforward_layernorm"),
    aliases=_ALIASES,
    fields=_FIELDS,
)

GEMMA3_TEXT = Architecture(
    class_name="Gemma3ForCausalLM",
    style=_gemma3,
    defaults=replace(_DEFAULTS, vocab_size=262_208, max_position_embeddings=131_072, rope_theta=1e6),
    names=_SANDWICH,
    aliases=_ALIASES,
    window_rope=WindowRope(10_000.0, "rope_local_base_freq"),
    fields={
        **_FIELDS,
        "rope_local_base_freq": (),
        "sliding_window_pattern": (),
        "use_bidirectional_attention": (False,),
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
