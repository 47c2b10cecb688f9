"""Reads the fields of config.json that families with experts share: how many there are, and which layers have them."""

from collections.abc import Sequence

from export.checkpoint.config_fields import shown
from export.checkpoint.fused import Split
from export.model.families.config_values import integer
from export.model.families.row import Raw, Sizes
from runtime.errors import InvalidCheckpoint, UnsupportedModel

MAX_EXPERTS = 1024
"""The largest published decoder has 384 in a layer."""


MAX_FURTHER = 16
"""The largest published decoder has one."""


def stacked_experts(
    ours: str = "mlp.experts.{}", parts: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Split, ...]:
    """The experts as transformers 5 holds them, which it writes where it is asked to: each matrix of all in one tensor.

    ours: an expert's name in a block; parts: names of gate, up and down
    """
    gate, up, down = ((f"{ours}.{part}", None) for part in parts)
    return (
        Split("mlp.experts.gate_up_proj", (gate, up), experts=True),
        Split("mlp.experts.down_proj", (down,), experts=True),
    )


def num_experts(raw: Raw, names: Sequence[str], default: int) -> int:
    """Experts of a layer. transformers reads several names for it; InvalidCheckpoint if their values differ."""
    found = {name: integer(raw, name, default, maximum=MAX_EXPERTS) for name in names if name in raw}
    if len(set(found.values())) > 1:
        raise InvalidCheckpoint(f"config.json: {shown(found)} say different things; remove the wrong one")
    return next(iter(found.values()), default)


def top_k(raw: Raw, default: int, experts: int, name: str = "num_experts_per_tok") -> int:
    """Experts of a token, at most `experts`."""
    count = integer(raw, name, default, maximum=MAX_EXPERTS)
    if count > experts:
        raise InvalidCheckpoint(f"config.json: {name} {count} is more than the {experts} experts of a layer")
    return count


def dense_between(raw: Raw, sizes: Sizes) -> frozenset[int]:
    """Layers without experts, as Qwen names them: mlp_only_layers, and all but each decoder_sparse_step-th."""
    step = integer(raw, "decoder_sparse_step", 1, maximum=sizes.num_layers)
    named = raw.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
        raise InvalidCheckpoint(f"config.json: mlp_only_layers must be a list of layers, got {shown(named)}")
    return frozenset(layer for layer in range(sizes.num_layers) if layer in named or (layer + 1) % step)


def dense_first(raw: Raw, default: int, sizes: Sizes) -> frozenset[int]:
    """The first layers, which have no experts: first_k_dense_replace."""
    return frozenset(range(min(integer(raw, "first_k_dense_replace", default, minimum=0), sizes.num_layers)))


def groups(raw: Raw, experts: int, chosen: int, default: tuple[int, int]) -> tuple[int, int]:
    """n_group and topk_group; InvalidCheckpoint if they do not fit the experts."""
    named = {name: value for name, value in raw.items() if value is not None}
    num_groups = integer(named, "n_group", default[0], maximum=experts)
    top_groups = integer(named, "topk_group", default[1], maximum=num_groups)
    if experts % num_groups or chosen > experts // num_groups * top_groups:
        raise InvalidCheckpoint(
            f"config.json: {experts} experts in n_group {num_groups} groups, of which topk_group {top_groups} count, "
            f"do not give each token {chosen} experts"
        )
    return num_groups, top_groups


def further_layers(raw: Raw, sizes: Sizes) -> str:
    """Matches the tensors of num_nextn_predict_layers after the last layer, which draft tokens further ahead."""
    count = integer(raw, "num_nextn_predict_layers", 1, minimum=0, maximum=MAX_FURTHER)
    every = "|".join(str(sizes.num_layers + idx) for idx in range(count))
    return rf"model\.layers\.({every})\..*" if count else ""


def refuse(raw: Raw, name: str, reason: str) -> None:
    """UnsupportedModel if a switch is on."""
    if raw.get(name):
        raise UnsupportedModel(f"config.json: {name} = {shown(raw[name])} is not supported, {reason}")
