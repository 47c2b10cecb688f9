"""Reads the rotary embeddings of a config.json; in some families, layers with a window have one of their own.

transformers 4 writes rope_theta and rope_scaling for the layers without a window, transformers 5 an object for each
kind of layer: `{"full_attention": {"rope_theta": 1e6, ...}, "sliding_attention": {...}}`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from export.checkpoint.config_fields import shown
from export.model.description import RopeConfig
from export.model.families.config_values import number
from export.model.families.rope_fields import rope_config
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_FULL, _WINDOWED = "full_attention", "sliding_attention"


class WindowRope(NamedTuple):
    """The base of the rotary embedding of layers with a window: transformers' default, and its field, if it has one."""

    theta: float
    field: str = ""


class Ropes(NamedTuple):
    """The rotary embeddings of layers without and with a window."""

    full: RopeConfig
    windowed: RopeConfig


def ropes_of(
    raw: Mapping[str, Any],
    max_len: int,
    default_theta: float,
    *,
    can_be_partial: bool,
    window_rope: WindowRope | None,
) -> Ropes:
    """Read both; errors as in `rope_config`. window_rope: None where all layers have the same."""
    if window_rope is None:
        rope = rope_config(raw, max_len, default_theta, can_be_partial=can_be_partial)
        return Ropes(rope, rope)
    both = raw.get("rope_parameters") or {}
    if not isinstance(both, dict):
        raise InvalidCheckpoint(f"config.json: rope_parameters must be an object, got {shown(both)}")
    if not both.keys() <= {_FULL, _WINDOWED}:
        raise UnsupportedModel(
            f"config.json: rope_parameters has {', '.join(both)}; model_type {raw['model_type']!r} means {_FULL} and "
            f"{_WINDOWED}"
        )
    rest = {name: value for name, value in raw.items() if name not in ("rope_theta", "rope_scaling", "rope_parameters")}
    theta = number(raw, window_rope.field, window_rope.theta) if window_rope.field else window_rope.theta
    return Ropes(
        rope_config({**raw, "rope_parameters": both.get(_FULL)}, max_len, default_theta, can_be_partial=can_be_partial),
        rope_config({**rest, "rope_parameters": both.get(_WINDOWED)}, max_len, theta, can_be_partial=can_be_partial),
    )
