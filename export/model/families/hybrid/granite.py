"""Granite 4: Mamba 2, with attention in some layers, and a shared expert that may have others beside it."""

from collections.abc import Mapping

from export.checkpoint.fused import Split
from export.model.families.config_values import flag, integer, number
from export.model.families.experts.mixture import num_experts, top_k
from export.model.families.hybrid.layer_kinds import layer_kinds
from export.model.families.hybrid.mamba import MAMBA_FIELDS, mamba, mamba_splits
from export.model.families.row import Architecture, BlockParts, Mixture, Names, Raw, Sizes, Style
from export.model.mixers import Mamba2
from export.model.routing import Routing

_SHARED, _EXPERT = "shared_mlp", "block_sparse_moe.experts.{}"
_NAMES = Names(
    gate=f"{_SHARED}.gate_proj",
    up=f"{_SHARED}.up_proj",
    down=f"{_SHARED}.down_proj",
    shared=_SHARED,
    router="block_sparse_moe.router",
    experts="block_sparse_moe.experts.{expert}",
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    kinds = layer_kinds(raw, sizes, "linear_attention", default=lambda layer: False)
    bias, shared = flag(raw, "attention_bias"), integer(raw, "shared_intermediate_size", 1024)

    def recurrence(parts: BlockParts) -> Mamba2:
        return mamba(raw, sizes, parts)

    return Style(
        qkv_bias=bias,
        o_bias=bias,
        has_rotary=raw.get("position_embedding_type") == "rope",
        attention_scale=number(raw, "attention_multiplier", 1.0),
        embedding_scale=number(raw, "embedding_multiplier", 1.0),
        logit_scale=1 / number(raw, "logits_scaling", 1.0),
        intermediate_size=shared,
        mixture=_mixture(raw, sizes, shared),
        mixers=tuple(None if kind == "full_attention" else recurrence for kind in kinds),
    )


def _mixture(raw: Raw, sizes: Sizes, shared: int) -> Mixture | None:
    if raw.get("num_local_experts") == 0:
        return None
    count = num_experts(raw, ["num_local_experts"], 8)
    return Mixture(
        num_experts=count,
        intermediate_size=sizes.intermediate_size,
        routing=Routing(top_k=top_k(raw, 2, count)),
        shared_size=shared,
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    moe = "block_sparse_moe"
    return (
        *mamba_splits(raw, sizes),
        Split(f"{_SHARED}.input_linear", ((f"{_SHARED}.gate_proj", None), (f"{_SHARED}.up_proj", None))),
        Split(f"{_SHARED}.output_linear", ((f"{_SHARED}.down_proj", None),)),
        Split(f"{moe}.input_linear", ((f"{_EXPERT}.gate_proj", None), (f"{_EXPERT}.up_proj", None)), experts=True),
        Split(f"{moe}.output_linear", ((f"{_EXPERT}.down_proj", None),), experts=True),
        Split(f"{moe}.router.layer", ((f"{moe}.router", None),)),
    )


def _scales(raw: Raw, sizes: Sizes) -> Mapping[str, float]:
    """What a block adds to the stream is multiplied: fold that into the last matrices."""
    factor = number(raw, "residual_multiplier", 1.0)
    names = ("o_proj.weight", "o_proj.bias", "out_proj.weight", "out_proj.bias", "down_proj.weight")
    return dict.fromkeys(names, factor)


GRANITE_MOE_HYBRID = Architecture(
    class_name="GraniteMoeHybridForCausalLM",
    style=_style,
    names=_NAMES,
    splits=_splits,
    scales=_scales,
    fields={
        **MAMBA_FIELDS,
        **dict.fromkeys(("attention_bias", "shared_intermediate_size", "num_local_experts", "num_experts_per_tok"), ()),
        **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), ()),
        "position_embedding_type": ("rope", "nope"),
        "normalization_function": ("rmsnorm",),
        "init_method": (),
    },
)
