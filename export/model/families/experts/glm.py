"""GLM 4.5 and 4.6: sigmoid scores with a bias that only chooses, groups of experts, and a shared expert."""

from export.model.families.config_values import flag, integer, number, share
from export.model.families.experts.mixture import (
    dense_first,
    further_layers,
    groups,
    num_experts,
    stacked_experts,
    top_k,
)
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing, Scores

_DEFAULTS = Defaults(
    vocab_size=151_552,
    hidden_size=4096,
    intermediate_size=10_944,
    num_layers=46,
    num_heads=96,
    num_kv_heads=8,
    max_position_embeddings=131_072,
    norm_eps=1e-5,
    bos_id=None,
    eos_id=None,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count, has_bias = num_experts(raw, ["n_routed_experts", "num_local_experts"], 128), flag(raw, "attention_bias")
    chosen, inner = top_k(raw, 8, count), integer(raw, "moe_intermediate_size", 1408)
    num_groups, top_groups = groups(raw, count, chosen, (1, 1))
    routing = Routing(
        top_k=chosen,
        scores=Scores.SIGMOID,
        is_normalized=flag(raw, "norm_topk_prob", default=True),
        epsilon=1e-20,
        scale=number(raw, "routed_scaling_factor", 1.0),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    return Style(
        qkv_bias=has_bias,
        qk_norm=flag(raw, "use_qk_norm"),
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor", 0.5)),
        mixture=Mixture(
            num_experts=count,
            intermediate_size=inner,
            routing=routing,
            has_choice_bias=True,
            shared_size=inner * integer(raw, "n_shared_experts", 1),
            dense_layers=dense_first(raw, 1, sizes),
        ),
        windows=windows(raw, "never", sizes, _DEFAULTS),
    )


GLM4_MOE = Architecture(
    class_name="Glm4MoeForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    splits=lambda raw, sizes: stacked_experts(),
    names=Names(shared="mlp.shared_experts"),
    unused=further_layers,
    fields=dict.fromkeys(
        (
            "n_routed_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
            "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "use_qk_norm",
            "attention_bias", "partial_rotary_factor", "num_nextn_predict_layers", "num_mtp_layers",
        ),
        (),
    ),
)  # fmt: skip
