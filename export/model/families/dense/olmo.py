"""OLMo: layer norms without weights. OLMo 2 and 3: norms behind attention and MLP alone, and over queries and keys.

In OLMo 3, three of four layers have a window and a rotary embedding that is not scaled for longer contexts.
"""

from dataclasses import replace

from export.model.description import NormKind
from export.model.families.config_values import flag, optional_number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from export.model.families.window_ropes import WindowRope
from export.model.families.windows import windows
from runtime.errors import UnsupportedModel

_OLMO = Defaults(vocab_size=50_304, norm_eps=1e-5, bos_id=None, eos_id=50_279)
_OLMO3 = replace(_OLMO, rope_theta=500_000.0, window=4096)
_POST_NORMS = Names(
    attention_norm="",
    attention_out_norm="post_attention_layernorm",
    mlp_norm="",
    mlp_out_norm="post_feedforward_layernorm",
)


def _olmo(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2402.00838. The norms' epsilon is fixed in the model's code."""
    if "rms_norm_eps" in raw:
        raise UnsupportedModel("config.json: rms_norm_eps is not supported for model_type 'olmo': it is fixed")
    bias = flag(raw, "attention_bias")
    return Style(
        norm_kind=NormKind.LAYER,
        norm_weight=False,
        qkv_bias=bias,
        o_bias=bias,
        qkv_clip=optional_number(raw, "clip_qkv"),
    )


OLMO = Architecture(
    class_name="OlmoForCausalLM", style=_olmo, defaults=_OLMO, fields={"attention_bias": (), "clip_qkv": ()}
)


def _olmo2(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2501.00656."""
    bias = flag(raw, "attention_bias")
    return Style(qkv_bias=bias, o_bias=bias, qk_norm=True, qk_norm_is_whole=True)


OLMO2 = Architecture(
    class_name="Olmo2ForCausalLM", style=_olmo2, defaults=_OLMO, names=_POST_NORMS, fields={"attention_bias": ()}
)


def _olmo3(raw: Raw, sizes: Sizes) -> Style:
    theta = raw.get("rope_theta", _OLMO3.rope_theta)
    if theta != _OLMO3.rope_theta:
        raise UnsupportedModel(
            f"config.json: rope_theta = {theta} is not supported for model_type 'olmo3': releases of transformers "
            "differ in whether layers with a window have it too; write rope_parameters for both kinds of layers"
        )
    return replace(_olmo2(raw, sizes), windows=windows(raw, "patterned", sizes, _OLMO3, pattern=4))


OLMO3 = Architecture(
    class_name="Olmo3ForCausalLM",
    style=_olmo3,
    defaults=_OLMO3,
    names=_POST_NORMS,
    window_rope=WindowRope(500_000.0),
    fields={"attention_bias": ()},
)
