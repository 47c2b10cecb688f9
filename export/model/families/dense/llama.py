"""Llama, Mistral, Ministral, Qwen2 and Qwen3: RMS norms before attention and MLP, gated SiLU, rotary embedding."""

from collections.abc import Callable
from dataclasses import replace

from export.model.families.config_values import flag
from export.model.families.row import Architecture, Defaults, Raw, Sizes, Style
from export.model.families.windows import windows

_ANY: tuple[object, ...] = ()

_LLAMA = Defaults()
_MISTRAL = Defaults(intermediate_size=14_336, num_kv_heads=8, max_position_embeddings=131_072, window=4096)
_QWEN2 = Defaults(
    vocab_size=151_936,
    intermediate_size=22_016,
    num_kv_heads=32,
    max_position_embeddings=32_768,
    window=4096,
    bos_id=None,
    eos_id=None,
)
_QWEN3 = replace(_QWEN2, head_dim=128)


def _style(
    defaults: Defaults,
    *,
    sliding: str = "never",
    qkv_bias: bool | str = False,
    o_bias: bool | str = False,
    mlp_bias: bool | str = False,
    qk_norm: bool = False,
) -> Callable[[Raw, Sizes], Style]:
    """sliding: see `windows`. Each bias is True, False, or the name of its config field."""

    def style(raw: Raw, sizes: Sizes) -> Style:
        def switch(value: bool | str) -> bool:
            return value if isinstance(value, bool) else flag(raw, value)

        return Style(
            qkv_bias=switch(qkv_bias),
            o_bias=switch(o_bias),
            mlp_bias=switch(mlp_bias),
            qk_norm=qk_norm,
            windows=windows(raw, sliding, sizes, defaults),
        )

    return style


LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    style=_style(_LLAMA, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    defaults=_LLAMA,
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)

MISTRAL = Architecture(class_name="MistralForCausalLM", style=_style(_MISTRAL, sliding="always"), defaults=_MISTRAL)

MINISTRAL = Architecture(class_name="MinistralForCausalLM", style=_style(_MISTRAL, sliding="always"), defaults=_MISTRAL)

QWEN2 = Architecture(
    class_name="Qwen2ForCausalLM",
    style=_style(_QWEN2, sliding="flagged", qkv_bias=True),
    defaults=_QWEN2,
    fields={"attention_bias": (True, False), "qkv_bias": (True,), "use_mrope": (False,)},
)

QWEN3 = Architecture(
    class_name="Qwen3ForCausalLM",
    style=_style(_QWEN3, sliding="flagged", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True),
    defaults=_QWEN3,
    fields={"attention_bias": _ANY, "use_qk_norm": (True,), "qk_norm": (True,)},
)
