"""Hunyuan-A13B: Hunyuan's block with experts and an MLP beside them."""

from dataclasses import replace

from export.checkpoint.config_fields import shown
from export.model.families.dense.hunyuan import HUNYUAN_V1_DENSE
from export.model.families.experts.mixture import num_experts, stacked_experts, top_k
from export.model.families.row import Mixture, Raw, Sizes, Style
from export.model.routing import Routing
from runtime.errors import UnsupportedModel


def _style(raw: Raw, sizes: Sizes) -> Style:
    values = {**raw, **{name: _for_all_layers(raw, name) for name in ("num_experts", "moe_topk") if name in raw}}
    count = num_experts(values, ["num_experts", "num_local_experts"], 1)
    mixture = Mixture(
        num_experts=count,
        intermediate_size=sizes.intermediate_size,
        routing=Routing(top_k=top_k(values, 1, count, "moe_topk")),
        shared_size=sizes.intermediate_size,
    )
    return replace(HUNYUAN_V1_DENSE.style(raw, sizes), mixture=mixture)


def _for_all_layers(raw: Raw, name: str) -> object:
    """A number, or the one that a list has for every layer."""
    value = raw[name]
    if isinstance(value, list) and len({str(one) for one in value}) == 1:
        return value[0]
    if isinstance(value, list):
        raise UnsupportedModel(f"config.json: {name} = {shown(value)} differs between layers, which is not supported")
    return value


HUNYUAN_V1_MOE = replace(
    HUNYUAN_V1_DENSE,
    class_name="HunYuanMoEV1ForCausalLM",
    style=_style,
    splits=lambda raw, sizes: stacked_experts(),
    names=replace(HUNYUAN_V1_DENSE.names, router="mlp.gate.wg", shared="mlp.shared_mlp"),
    fields={
        **HUNYUAN_V1_DENSE.fields,
        **dict.fromkeys(("num_experts", "num_local_experts", "moe_topk", "num_experts_per_tok"), ()),
        "moe_intermediate_size": (),
        "num_shared_expert": (),
        "use_mixed_mlp_moe": (True,),
        "moe_layer_num_skipped": (0,),
        "norm_topk_prob": (True,),
        "moe_drop_tokens": (False,),
        "moe_random_routing_dropped_token": (False,),
        "capacity_factor": (),
        "routed_scaling_factor": (1,),
        "use_rotary_pos_emb": (True,),
        "class_num": (0,),
        "cla_share_factor": (),
        "dense_list": (),
        "pool_type": (),
        "group_limited_greedy": (False,),
    },
)
