"""Reads from config.json which layers of a hybrid decoder have attention, and which a recurrence."""

from collections.abc import Callable

from export.checkpoint.config_fields import shown
from export.model.families.row import Raw, Sizes
from runtime.errors import UnsupportedModel

ATTENTION = "full_attention"


def layer_kinds(raw: Raw, sizes: Sizes, other: str, *, default: Callable[[int], object]) -> list[str]:
    """`full_attention` or `other` for each layer. default: whether a layer has attention, if there is no layer_types.

    transformers 4 wrote `attention` and `mamba`.

    UnsupportedModel for another kind of layer, and if no layer has attention: the KV cache says how long a slot is.
    """
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = [ATTENTION if default(layer) else other for layer in range(sizes.num_layers)]
    if isinstance(kinds, list):
        older = {"attention": ATTENTION, "mamba": other}
        kinds = [older.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if not (isinstance(kinds, list) and len(kinds) == sizes.num_layers and all(k in (ATTENTION, other) for k in kinds)):
        raise UnsupportedModel(
            f"config.json: layer_types must name {ATTENTION} or {other} for each of the {sizes.num_layers} layers, got "
            f"{shown(kinds)}"
        )
    if ATTENTION not in kinds:
        raise UnsupportedModel(f"config.json: no layer has {ATTENTION}; supported: at least one")
    return kinds
