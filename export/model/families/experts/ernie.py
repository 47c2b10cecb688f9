"""ERNIE 4.5 with experts: interleaved rotary pairs, and a bias that only chooses experts."""

from export.model.families.config_values import flag, integer, number
from export.model.families.experts.mixture import num_experts, stacked_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing

_DEFAULTS = Defaults(
    vocab_size=103_424,
    hidden_size=2560,
    intermediate_size=12_288,
    num_layers=28,
    num_heads=20,
    num_kv_heads=4,
    max_position_embeddings=131_072,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    is_tied=True,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count = num_experts(raw, ["moe_num_experts", "num_experts"], 64)
    name = "moe_k" if "moe_k" in raw else "num_experts_per_tok"
    inner, num_shared = (
        integer(raw, "moe_intermediate_size", 1536),
        integer(raw, "moe_num_shared_experts", 2, minimum=0),
    )
    has_bias = flag(raw, "use_bias")
    mixture = Mixture(
        num_experts=count,
        intermediate_size=inner,
        routing=Routing(top_k=top_k(raw, 6, count, name), least_sum=number(raw, "moe_norm_min", 1e-12)),
        has_choice_bias=True,
        shared_size=inner * num_shared,
        dense_layers=_dense_layers(raw, sizes),
    )
    return Style(
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=has_bias,
        rotary_interleaved=True,
        mixture=mixture,
        windows=windows(raw, "never", sizes, _DEFAULTS),
    )


def _dense_layers(raw: Raw, sizes: Sizes) -> frozenset[int]:
    """Layers outside the first and the last with experts, and those that the interval leaves out."""
    first = integer(raw, "moe_layer_start_index", 1, minimum=0)
    last = integer(raw, "moe_layer_end_index", -1, minimum=-1)
    step = integer(raw, "moe_layer_interval", 1)
    last = sizes.num_layers - 1 if last == -1 else last
    return frozenset(layer for layer in range(sizes.num_layers) if not first <= layer <= last or (layer + 1) % step)


ERNIE4_5_MOE = Architecture(
    class_name="Ernie4_5_MoeForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    splits=lambda raw, sizes: stacked_experts(),
    renames={"gate.moe_statics": "moe_statics"},
    unused=lambda raw, sizes: r"model\.mtp_.*",
    names=Names(choice_bias="mlp.moe_statics.e_score_correction_bias", shared="mlp.shared_experts"),
    fields={
        **dict.fromkeys(
            (
                "moe_num_experts", "num_experts", "moe_k", "num_experts_per_tok", "moe_intermediate_size",
                "moe_num_shared_experts", "moe_norm_min", "use_bias", "moe_layer_start_index", "moe_layer_end_index",
                "moe_layer_interval", "moe_capacity",
            ),
            (),
        ),
        "moe_gate": ("topk",),
        "moe_use_aux_free": (True,),
    },
)  # fmt: skip
