"""Granite with experts: Llama's block with multipliers, and fused experts; the `shared` one has an MLP beside them."""

from collections.abc import Mapping

from export.checkpoint.fused import Split
from export.model.families.config_values import flag, integer, number
from export.model.families.experts.mixture import num_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing

_FIELDS: dict[str, tuple[object, ...]] = dict.fromkeys(
    (
        "num_local_experts", "num_experts_per_tok", "attention_bias", "embedding_multiplier", "logits_scaling",
        "residual_multiplier", "attention_multiplier",
    ),
    (),
)  # fmt: skip
_NAMES = Names(router="block_sparse_moe.router.layer", experts="block_sparse_moe.experts.{expert}", shared="shared_mlp")


def _style(raw: Raw, sizes: Sizes) -> Style:
    count, bias = num_experts(raw, ["num_local_experts"], 8), flag(raw, "attention_bias")
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=number(raw, "attention_multiplier", 1),
        embedding_scale=number(raw, "embedding_multiplier", 1),
        logit_scale=1 / number(raw, "logits_scaling", 1),
        mixture=Mixture(
            num_experts=count,
            intermediate_size=sizes.intermediate_size,
            routing=Routing(top_k=top_k(raw, 2, count)),
            shared_size=integer(raw, "shared_intermediate_size", 0, minimum=0),
        ),
        windows=windows(raw, "never", sizes, Defaults()),
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    moe, shared = "block_sparse_moe", "shared_mlp"
    gate_up = tuple((f"{moe}.experts.{{}}.{part}_proj", None) for part in ("gate", "up"))
    down = ((f"{moe}.experts.{{}}.down_proj", None),)
    return (
        Split(f"{moe}.input_linear", gate_up, experts=True),
        Split(f"{moe}.output_linear", down, experts=True),
        # As transformers 5 calls them.
        Split(f"{moe}.experts.gate_up_proj", gate_up, experts=True),
        Split(f"{moe}.experts.down_proj", down, experts=True),
        Split(f"{moe}.router", ((f"{moe}.router.layer", None),)),
        Split(f"{shared}.input_linear", tuple((f"{shared}.{part}_proj", None) for part in ("gate", "up"))),
        Split(f"{shared}.output_linear", ((f"{shared}.down_proj", None),)),
    )


def _scales(raw: Raw, sizes: Sizes) -> Mapping[str, float]:
    """What a block adds to the stream is multiplied: fold that into the last matrices."""
    factor = number(raw, "residual_multiplier", 1)
    return dict.fromkeys(("o_proj.weight", "o_proj.bias", "down_proj.weight"), factor)


GRANITEMOE = Architecture(
    class_name="GraniteMoeForCausalLM", style=_style, names=_NAMES, splits=_splits, scales=_scales, fields=_FIELDS
)

GRANITEMOESHARED = Architecture(
    class_name="GraniteMoeSharedForCausalLM",
    style=_style,
    names=_NAMES,
    splits=_splits,
    scales=_scales,
    fields={**_FIELDS, "shared_intermediate_size": ()},
)
