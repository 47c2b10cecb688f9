"""Phi-3.5-MoE: layer norms, biases, longrope with its own two scales, and experts chosen by SparseMixer."""

from export.checkpoint.fused import Split
from export.model.description import NormKind
from export.model.families.config_values import flag, number
from export.model.families.experts.mixture import num_experts, stacked_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing, Scores

_DEFAULTS = Defaults(
    vocab_size=32_064,
    intermediate_size=6400,
    num_kv_heads=8,
    max_position_embeddings=131_072,
    norm_eps=1e-5,
    rope_theta=1e6,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count, has_bias = num_experts(raw, ["num_local_experts"], 16), flag(raw, "attention_bias")
    jitter = number(raw, "router_jitter_noise", 0.01)
    # transformers chooses two whatever num_experts_per_tok is.
    routing = Routing(top_k=top_k(raw, 2, count), scores=Scores.SPARSEMIXER, jitter=jitter)
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        qkv_bias=has_bias,
        o_bias=has_bias,
        head_bias=flag(raw, "lm_head_bias"),
        mixture=Mixture(num_experts=count, intermediate_size=sizes.intermediate_size, routing=routing),
        windows=windows(raw, "uniform", sizes, _DEFAULTS),
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    router = Split("mlp.router", (("block_sparse_moe.gate", None),))
    return (router, *stacked_experts("block_sparse_moe.experts.{}", ("w1", "w3", "w2")))


PHIMOE = Architecture(
    class_name="PhimoeForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    splits=_splits,
    rope_kinds=("default", "longrope"),
    names=Names(
        router="block_sparse_moe.gate", experts="block_sparse_moe.experts.{expert}", expert_parts=("w1", "w3", "w2")
    ),
    fields={
        "num_local_experts": (),
        "num_experts_per_tok": (2,),
        "router_jitter_noise": (),
        "input_jitter_noise": (),
        "attention_bias": (),
        "lm_head_bias": (),
        "original_max_position_embeddings": (),
    },
)
