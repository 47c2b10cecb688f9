"""Llama's tensor names with layer norms: StarCoder2, StableLM, Nemotron, Jais 2 and Phi-1 to Phi-2."""

from export.model.description import NormKind
from export.model.families.config_values import flag, share
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from export.model.families.windows import windows

_ANY: tuple[object, ...] = ()

_STARCODER2 = Defaults(
    vocab_size=49_152,
    hidden_size=3072,
    intermediate_size=12_288,
    num_layers=30,
    num_heads=24,
    num_kv_heads=2,
    max_position_embeddings=4096,
    norm_eps=1e-5,
    activation="gelu_pytorch_tanh",
    is_tied=True,
    bos_id=50_256,
    eos_id=50_256,
)


def _starcoder2(raw: Raw, sizes: Sizes) -> Style:
    bias = flag(raw, "use_bias", default=True)
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        is_gated=False,
        windows=windows(raw, "uniform", sizes, _STARCODER2),
    )


STARCODER2 = Architecture(
    class_name="Starcoder2ForCausalLM",
    style=_starcoder2,
    defaults=_STARCODER2,
    names=Names(up="mlp.c_fc", down="mlp.c_proj"),
    aliases={"norm_epsilon": "rms_norm_eps"},
    fields={"use_bias": _ANY, "norm_type": ("layer_norm",), "mlp_type": ("default",)},
)


def _stablelm(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        qkv_bias=flag(raw, "use_qkv_bias"),
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor", 0.25)),
    )


STABLELM = Architecture(
    class_name="StableLmForCausalLM",
    style=_stablelm,
    defaults=Defaults(
        vocab_size=50_304,
        hidden_size=2560,
        intermediate_size=6912,
        num_kv_heads=32,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        bos_id=0,
        eos_id=0,
    ),
    aliases={"layer_norm_eps": "rms_norm_eps"},
    # StableLM 2 12B alone has both: a norm for queries and keys with weights of its own for each head, which graphs
    # lack, and a parallel block.
    fields={
        "use_qkv_bias": _ANY,
        "use_parallel_residual": (False,),
        "qk_layernorm": (False,),
        "partial_rotary_factor": _ANY,
    },
)


def _phi(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        is_parallel=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=flag(raw, "qk_layernorm"),
        is_gated=False,
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor", 0.5)),
    )


PHI = Architecture(
    class_name="PhiForCausalLM",
    style=_phi,
    defaults=Defaults(
        vocab_size=51_200,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=24,
        norm_eps=1e-5,
        activation="gelu_new",
    ),
    names=Names(
        final_norm="model.final_layernorm",
        mlp_norm="",
        o="self_attn.dense",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        up="mlp.fc1",
        down="mlp.fc2",
    ),
    aliases={"layer_norm_eps": "rms_norm_eps"},
    fields={"qk_layernorm": _ANY, "partial_rotary_factor": _ANY},
)


def _relu2(raw: Raw, sizes: Sizes, *, bias: bool, adds_one: bool, rotary_share: float) -> Style:
    has_bias = flag(raw, "attention_bias", default=bias)
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        norm_adds_one=adds_one,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=flag(raw, "mlp_bias", default=bias),
        is_gated=False,
        rotary_dim=int(sizes.head_dim * rotary_share),
    )


def _nemotron(raw: Raw, sizes: Sizes) -> Style:
    return _relu2(raw, sizes, bias=False, adds_one=True, rotary_share=share(raw, "partial_rotary_factor", 0.5))


NEMOTRON = Architecture(
    class_name="NemotronForCausalLM",
    style=_nemotron,
    defaults=Defaults(
        vocab_size=256_000,
        hidden_size=6144,
        intermediate_size=24_576,
        num_heads=48,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        activation="relu2",
        bos_id=2,
        eos_id=3,
    ),
    aliases={"norm_eps": "rms_norm_eps"},
    fields={"attention_bias": _ANY, "mlp_bias": _ANY, "partial_rotary_factor": _ANY},
)


def _jais2(raw: Raw, sizes: Sizes) -> Style:
    return _relu2(raw, sizes, bias=True, adds_one=False, rotary_share=1)


JAIS2 = Architecture(
    class_name="Jais2ForCausalLM",
    style=_jais2,
    defaults=Defaults(
        vocab_size=150_272,
        hidden_size=3328,
        intermediate_size=26_624,
        num_heads=26,
        max_position_embeddings=8192,
        norm_eps=1e-5,
        activation="relu2",
        bos_id=0,
        eos_id=150_024,
    ),
    aliases={"layer_norm_eps": "rms_norm_eps"},
    fields={"attention_bias": _ANY, "mlp_bias": _ANY},
)
