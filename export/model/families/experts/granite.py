"""Granite with experts: Llama's block with multipliers, and fused experts; the `shared` one has an MLP beside them."""

from export.checkpoint.fused import Split
from export.model.families.config_values import flag, integer, number
from export.model.families.experts.mixture import num_experts, top_k
from export.model.families.row import Architecture, Mixture, Names, Raw, Sizes, Style
from export.model.routing import Routing

_FIELDS: dict[str, tuple[object, ...]] = dict.fromkeys(
    (
        "num_local_experts", "num_experts_per_tok", "attention_bias", "embedding_multiplier", "logits_scaling",
        "residual_multiplier", "attention_multiplier",
    ),
    (),
)  # fmt: skip
_NAMES = Names(
    router="block_sparse_moe.router.layer", experts="block_sparse_moe.experts.{expert}", shared="shared_mlp"
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count, bias = num_experts(raw, ["num_local_experts"], 8), flag(raw, "attention_bias")
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=number(raw, "attention_multiplier", 1),
        embedding_scale=number(raw, "embedding_multiplier", 1),
        residual_scale=number(raw, "residual_multiplier", 1),
        logit_scale=1 / number(raw, "logits_scaling", 1),
        mixture=Mixture(
            num_experts=count,
            intermediate_size=sizes.intermediate_size,
            routing=Routing(top_k=top_k(raw, 2, count)),
            shared_size=integer(raw, "shared_intermediate_size", 0, minimum=0),
        ),
    )


def _splits(sizes: Sizes) -> tuple[Split, ...]:
    moe, shared = "block_sparse_moe", "shared_mlp"
    return (
        Split(f"{moe}.input_linear", tuple((f"{moe}.experts.{{}}.{part}_proj", None) for part in ("gate", "up")),
              experts=True),
        Split(f"{moe}.output_linear", ((f"{moe}.experts.{{}}.down_proj", None),), experts=True),
        Split(f"{shared}.input_linear", tuple((f"{shared}.{part}_proj", None) for part in ("gate", "up"))),
        Split(f"{shared}.output_linear", ((f"{shared}.down_proj", None),)),
    )  # fmt: skip


GRANITEMOE = Architecture(
    class_name="GraniteMoeForCausalLM", style=_style, names=_NAMES, splits=_splits, fields=_FIELDS
)

GRANITEMOESHARED = Architecture(
    class_name="GraniteMoeSharedForCausalLM",
    style=_style,
    names=_NAMES,
    splits=_splits,
    fields={**_FIELDS, "shared_intermediate_size": ()},
)
