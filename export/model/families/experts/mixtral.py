"""Mixtral: Mistral's block with a mixture of experts instead of the MLP."""

from export.checkpoint.fused import Split
from export.model.families.experts.mixture import num_experts, stacked_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing

_DEFAULTS = Defaults(
    intermediate_size=14_336,
    num_kv_heads=8,
    max_position_embeddings=131_072,
    norm_eps=1e-5,
    rope_theta=1e6,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count = num_experts(raw, ["num_local_experts"], 8)
    mixture = Mixture(
        num_experts=count, intermediate_size=sizes.intermediate_size, routing=Routing(top_k=top_k(raw, 2, count))
    )
    return Style(mixture=mixture, windows=windows(raw, "uniform", sizes, _DEFAULTS))


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    router = Split("mlp.gate", (("block_sparse_moe.gate", None),))
    return (router, *stacked_experts("block_sparse_moe.experts.{}", ("w1", "w3", "w2")))


MIXTRAL = Architecture(
    class_name="MixtralForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    splits=_splits,
    names=Names(
        router="block_sparse_moe.gate", experts="block_sparse_moe.experts.{expert}", expert_parts=("w1", "w3", "w2")
    ),
    fields={"num_local_experts": (), "num_experts_per_tok": (), "router_jitter_noise": ()},
)
