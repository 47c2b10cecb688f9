"""DeepSeek V2 and V3: latent attention, groups of experts, and shared experts; the first layers have none.

V2 (arXiv:2405.04434) weighs experts by a softmax. V3 (arXiv:2412.19437) weighs them by sigmoids, and a bias chooses.
"""

import math

from export.model.families.config_values import flag, integer, number
from export.model.families.experts.mixture import (
    dense_first,
    further_layers,
    groups,
    num_experts,
    stacked_experts,
    top_k,
)
from export.model.families.row import Architecture, Defaults, LatentSizes, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing, Scores
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_V2 = Defaults(vocab_size=102_400)
_V3 = Defaults(
    vocab_size=129_280,
    hidden_size=7168,
    intermediate_size=18_432,
    num_layers=61,
    num_heads=128,
    num_kv_heads=128,
    max_position_embeddings=4096,
    bos_id=0,
    eos_id=1,
)
_FIELDS = (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group",
    "routed_scaling_factor", "first_k_dense_replace", "attention_bias", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size",
)  # fmt: skip


def _v2(raw: Raw, sizes: Sizes) -> Style:
    count = num_experts(raw, ["n_routed_experts", "num_experts"], 64)
    if raw.get("num_experts_per_tok") is None:
        raise InvalidCheckpoint("config.json: there is no num_experts_per_tok, which has no default in this family")
    chosen = top_k(raw, 6, count)
    is_grouped = raw.get("topk_method") == "group_limited_greedy"
    num_groups, top_groups = groups(raw, count, chosen, (1, 1)) if is_grouped else (1, 1)
    routing = Routing(
        top_k=chosen,
        is_normalized=False,
        scale=number(raw, "routed_scaling_factor", 1.0),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    return _style(raw, sizes, count, routing, inner=1407, num_shared=2, num_dense=0, interleaved=True)


def _v3(raw: Raw, sizes: Sizes) -> Style:
    count = num_experts(raw, ["n_routed_experts", "num_local_experts"], 256)
    chosen = top_k(raw, 8, count)
    num_groups, top_groups = groups(raw, count, chosen, (8, 4))
    routing = Routing(
        top_k=chosen,
        scores=Scores.SIGMOID,
        is_normalized=flag(raw, "norm_topk_prob", default=True),
        epsilon=1e-20,
        scale=number(raw, "routed_scaling_factor", 2.5),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    interleaved = flag(raw, "rope_interleave", default=True)
    return _style(raw, sizes, count, routing, inner=2048, num_shared=1, num_dense=3, interleaved=interleaved)


def _style(
    raw: Raw,
    sizes: Sizes,
    count: int,
    routing: Routing,
    *,
    inner: int,
    num_shared: int,
    num_dense: int,
    interleaved: bool,
) -> Style:
    """inner, num_shared, num_dense: the family's defaults."""
    latent = LatentSizes(
        q_rank=None if raw.get("q_lora_rank", 1536) is None else integer(raw, "q_lora_rank", 1536),
        kv_rank=integer(raw, "kv_lora_rank", 512),
        still_dim=integer(raw, "qk_nope_head_dim", 128),
        rotating_dim=integer(raw, "qk_rope_head_dim", 64),
        value_dim=integer(raw, "v_head_dim", 128),
    )
    head_dim = latent.still_dim + latent.rotating_dim
    if head_dim % 8 or latent.value_dim >= head_dim:
        raise UnsupportedModel(
            f"config.json: v_head_dim {latent.value_dim} with heads of {head_dim} is not supported; supported: fewer, "
            "of a multiple of 8"
        )
    if sizes.num_kv_heads != sizes.num_heads:
        raise UnsupportedModel("config.json: num_key_value_heads other than num_attention_heads is not supported")
    bias, inner = flag(raw, "attention_bias"), integer(raw, "moe_intermediate_size", inner)
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=head_dim**-0.5 * _score_factor(raw),
        rotary_interleaved=interleaved,
        latent=latent,
        mixture=Mixture(
            num_experts=count,
            intermediate_size=inner,
            routing=routing,
            has_choice_bias=routing.scores is Scores.SIGMOID,
            shared_size=inner * integer(raw, "n_shared_experts", num_shared, minimum=0),
            dense_layers=dense_first(raw, num_dense, sizes),
        ),
        windows=windows(raw, "never", sizes, _V3),
    )


def _score_factor(raw: Raw) -> float:
    """YaRN's factor of the scores, which is squared, because it is for queries and keys."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    weight = rope.get("mscale_all_dim") or 0
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not weight or rope["factor"] <= 1:
        return 1.0
    return (0.1 * float(weight) * math.log(rope["factor"]) + 1) ** 2


DEEPSEEK_V2 = Architecture(
    class_name="DeepseekV2ForCausalLM",
    style=_v2,
    defaults=_V2,
    splits=lambda raw, sizes: stacked_experts(),
    names=Names(shared="mlp.shared_experts"),
    fields={
        **dict.fromkeys(_FIELDS, ()),
        "num_experts": (),
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),
        "moe_layer_freq": (1,),
    },
)

DEEPSEEK_V3 = Architecture(
    class_name="DeepseekV3ForCausalLM",
    style=_v3,
    defaults=_V3,
    splits=lambda raw, sizes: stacked_experts(),
    names=Names(shared="mlp.shared_experts"),
    unused=further_layers,
    fields={
        **dict.fromkeys(_FIELDS, ()),
        **dict.fromkeys(("num_local_experts", "norm_topk_prob", "rope_interleave"), ()),
        **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), ()),
        "topk_method": ("noaux_tc",),
        "scoring_func": ("sigmoid",),
        "moe_layer_freq": (1,),
    },
)
