"""Families that are Llama's block with other biases, pairs of the rotary embedding, or tensor names."""

from collections.abc import Callable

from export.model.families.config_values import flag
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style

_ANY: tuple[object, ...] = ()


def _style(
    *,
    qkv_bias: str = "attention_bias",
    o_bias: str = "",
    mlp_bias: str = "mlp_bias",
    is_biased: bool = False,
    is_interleaved: bool = False,
    is_gated: bool = True,
) -> Callable[[Raw, Sizes], Style]:
    """Each bias is the name of its config field, or empty for none; is_biased: whether qkv_bias is on by default."""

    def style(raw: Raw, sizes: Sizes) -> Style:
        return Style(
            qkv_bias=flag(raw, qkv_bias, default=is_biased),
            o_bias=bool(o_bias) and flag(raw, o_bias),
            mlp_bias=bool(mlp_bias) and flag(raw, mlp_bias),
            is_gated=is_gated,
            rotary_interleaved=is_interleaved,
        )

    return style


SEED_OSS = Architecture(
    class_name="SeedOssForCausalLM",
    style=_style(o_bias="attention_out_bias", is_biased=True),
    defaults=Defaults(
        vocab_size=155_136,
        intermediate_size=27_648,
        num_layers=64,
        num_heads=80,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=524_288,
        bos_id=0,
    ),
    fields={"attention_bias": _ANY, "attention_out_bias": _ANY, "mlp_bias": _ANY},
)

HELIUM = Architecture(
    class_name="HeliumForCausalLM",
    style=_style(is_interleaved=True),
    defaults=Defaults(
        vocab_size=48_000,
        hidden_size=2560,
        intermediate_size=7040,
        num_layers=24,
        num_heads=20,
        num_kv_heads=20,
        head_dim=128,
        max_position_embeddings=4096,
        norm_eps=1e-8,
        rope_theta=100_000.0,
    ),
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)

ERNIE4_5 = Architecture(
    class_name="Ernie4_5ForCausalLM",
    style=_style(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", is_interleaved=True),
    defaults=Defaults(
        vocab_size=103_424,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=18,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        max_position_embeddings=131_072,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        is_tied=True,
    ),
    fields={"use_bias": _ANY},
)

_INTERNLM3 = Defaults(
    vocab_size=128_512,
    intermediate_size=10_240,
    num_layers=48,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=32_768,
    norm_eps=1e-5,
)
INTERNLM3 = Architecture(
    class_name="InternLM3ForCausalLM",
    style=_style(o_bias="mlp_bias"),
    defaults=_INTERNLM3,
    synonyms={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)

IQUESTCODER = Architecture(
    class_name="IQuestCoderForCausalLM",
    style=_style(o_bias="attention_bias"),
    defaults=Defaults(
        vocab_size=76_800,
        hidden_size=5120,
        intermediate_size=27_648,
        num_layers=80,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        norm_eps=1e-5,
    ),
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)

EXAONE = Architecture(
    class_name="ExaoneForCausalLM",
    style=_style(o_bias="attention_bias"),
    defaults=Defaults(
        vocab_size=102_400,
        intermediate_size=14_336,
        num_kv_heads=8,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        eos_id=361,
    ),
    names=Names(
        block="transformer.h.{layer}",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        o="attn.attention.out_proj",
        gate="mlp.c_fc_0",
        up="mlp.c_fc_1",
        down="mlp.c_proj",
    ),
    synonyms={
        "num_layers": "num_hidden_layers",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)

ARCEE = Architecture(
    class_name="ArceeForCausalLM",
    style=_style(o_bias="attention_bias", is_gated=False),
    defaults=Defaults(
        hidden_size=2560,
        intermediate_size=18_432,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        activation="relu2",
        bos_id=128_000,
        eos_id=128_001,
    ),
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)
