"""Reads the rotary embedding from config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`.

transformers 4 writes the first two, transformers 5 the third, and some tools all of them. An unknown setting is
refused: without it the model would write nonsense beyond some length.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from export.checkpoint.config_fields import shown
from export.model.description import RopeConfig
from export.model.families.config_values import integer, number, optional_number
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        # Of these, transformers reads factor and, for Hunyuan, alpha.
        "dynamic": frozenset({"factor", "alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        "yarn": frozenset(
            {
                "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                "mscale_all_dim", "truncate",
            }
        ),
        "longrope": frozenset(
            {
                "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
                "short_mscale", "long_mscale",
            }
        ),
    }
)  # fmt: skip
"""The fields of each rope type, besides rope_theta."""

_ORIGINAL = "original_max_position_embeddings"

_NO_EFFECT = frozenset({"finetuned", _ORIGINAL, "mrope_section", "mrope_interleaved"})
"""Allowed in every type: they tell how the model was made, or where the patches of an image stand. A token of text has
one position."""

_NEUTRAL_ONE = frozenset({"factor", "partial_rotary_factor", "attention_factor", "attn_factor", "extrapolation_factor"})

MAX_FACTOR = 65_536
"""Limit of `factor`; published models have up to 128."""


def rope_config(
    raw: Mapping[str, Any], max_len: int, default_theta: float, *, can_be_partial: bool = False
) -> RopeConfig:
    """Read the rotary embedding of a config.json whose max_position_embeddings is `max_len`.

    can_be_partial: whether the family reads partial_rotary_factor, which transformers 5 writes to rope_parameters
    UnsupportedModel for a type or field that graphs do not have; InvalidCheckpoint for an invalid value, and for two
    fields that differ.
    """
    top = number(raw, "rope_theta", default_theta)
    found = {
        field: _parsed(_with_outer(raw, field, can_be_partial=can_be_partial), field, top, max_len)
        for field in ("rope_scaling", "rope_parameters")
        if raw.get(field) not in (None, {}, [])
    }
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise InvalidCheckpoint(
            f"config.json: rope_scaling {shown(raw['rope_scaling'])} and rope_parameters "
            f"{shown(raw['rope_parameters'])} say different things; remove the wrong one"
        )
    rope = next(iter(found.values()), RopeConfig(theta=top, original_max_len=max_len))
    if "rope_theta" in raw and rope.theta != top:
        raise InvalidCheckpoint(
            f"config.json: rope_theta is {top:g}, and {next(iter(found))} has {rope.theta:g}; remove the wrong one"
        )
    if rope.theta < 1:
        raise InvalidCheckpoint(f"config.json: rope_theta must be at least 1, got {rope.theta:g}")
    return rope


def _with_outer(raw: Mapping[str, Any], field: str, *, can_be_partial: bool) -> object:
    """One of the two objects, with the top-level original length, and without the field that the family reads."""
    values = raw[field]
    if not isinstance(values, dict):
        return values
    outer = {_ORIGINAL: raw[_ORIGINAL]} if raw.get(_ORIGINAL) is not None and values.get(_ORIGINAL) is None else {}
    skipped = ("partial_rotary_factor",) if can_be_partial else ()
    return {**{key: value for key, value in values.items() if key not in skipped}, **outer}


def _parsed(values: object, field: str, top_theta: float, max_len: int) -> RopeConfig:
    """Parse one of the two objects."""
    if not isinstance(values, dict):
        raise InvalidCheckpoint(f"config.json: {field} must be an object, got {shown(values)}")
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModel(
            f"config.json: {field} has settings by kind of layer ({shown(nested)}), which are not supported; "
            "supported: one setting for all layers"
        )
    kind = _kind(values, field)
    _refuse_fields(values, field, kind)
    plain = RopeConfig(theta=number(values, "rope_theta", top_theta, inside=field), original_max_len=max_len)
    if kind == "default":
        return plain
    if kind == "dynamic" and values.get("alpha") is not None:
        return replace(plain, kind="ntk", factor=number(values, "alpha", inside=field))
    if kind == "longrope":
        return _longrope(plain, values, field, max_len)
    factor = number(values, "factor", inside=field)
    if factor > MAX_FACTOR:
        raise InvalidCheckpoint(f"config.json: {field}.factor must be at most {MAX_FACTOR:,}, got {factor:g}")
    if kind == "dynamic":
        return replace(plain, kind="dynamic")
    scaled = replace(plain, kind=kind, factor=factor)
    if kind == "linear":
        return scaled
    scaled = replace(scaled, original_max_len=integer(values, _ORIGINAL, max_len, inside=field))
    return _llama3(scaled, values, field) if kind == "llama3" else _yarn(scaled, values, field)


def _kind(values: Mapping[str, Any], field: str) -> str:
    """The rope type; older releases of transformers call the field `type`."""
    kinds = {name: values[name] for name in ("rope_type", "type") if values.get(name) is not None}
    if not kinds and values.get("factor") not in (None, 1):
        raise InvalidCheckpoint(
            f"config.json: {field} has the factor {shown(values['factor'])} and no rope_type; add it: one of "
            f"{', '.join(_FIELDS)}"
        )
    kind = next(iter(kinds.values()), "default")
    if any(other != kind for other in kinds.values()):
        raise InvalidCheckpoint(f"config.json: {field} has two types, {shown(kinds)}; remove the wrong one")
    kind = "longrope" if kind == "su" else kind  # its name in the first Phi-3 files
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise UnsupportedModel(
            f"config.json: {field} has the rope type {shown(kind)}, which is not supported; supported: "
            f"{', '.join(_FIELDS)}"
        )
    return kind


def _refuse_fields(values: Mapping[str, Any], field: str, kind: str) -> None:
    for name, value in values.items():
        if name in ("rope_type", "type", "rope_theta") or name in _FIELDS[kind] or name in _NO_EFFECT:
            continue
        if value is None or value is False or (name in _NEUTRAL_ONE and value is not True and value == 1):
            continue
        raise UnsupportedModel(
            f"config.json: {field}.{name} = {shown(value)} is not supported for the rope type {kind!r}"
        )


def _llama3(rope: RopeConfig, values: Mapping[str, Any], field: str) -> RopeConfig:
    low, high = (number(values, name, inside=field) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise InvalidCheckpoint(
            f"config.json: {field}.low_freq_factor {low:g} must be less than high_freq_factor {high:g}"
        )
    return replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: RopeConfig, values: Mapping[str, Any], field: str) -> RopeConfig:
    read = {
        name: optional_number(values, name, inside=field)
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    }
    fast, slow = read["beta_fast"] or rope.beta_fast, read["beta_slow"] or rope.beta_slow
    if fast < slow or rope.theta <= 1:
        raise InvalidCheckpoint(
            f"config.json: {field} needs a beta_fast of at least beta_slow, and a rope_theta above 1; got beta_fast "
            f"{fast:g}, beta_slow {slow:g}, rope_theta {rope.theta:g}"
        )
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise InvalidCheckpoint(f"config.json: {field}.truncate must be true or false, got {shown(truncate)}")
    return replace(
        rope,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=read["attention_factor"],
        mscale=read["mscale"],
        mscale_all_dim=read["mscale_all_dim"],
        truncate=truncate,
    )


def _longrope(rope: RopeConfig, values: Mapping[str, Any], field: str, max_len: int) -> RopeConfig:
    """LongRoPE (arXiv:2402.13753); as in transformers, `factor` defaults to the quotient of the two lengths."""
    original = integer(values, _ORIGINAL, max_len, inside=field)
    return replace(
        rope,
        kind="longrope",
        original_max_len=original,
        factor=optional_number(values, "factor", inside=field) or max_len / original,
        attention_factor=optional_number(values, "attention_factor", inside=field),
        short_factors=_factors(values, "short_factor", field),
        long_factors=_factors(values, "long_factor", field),
        short_scale=optional_number(values, "short_mscale", inside=field),
        long_scale=optional_number(values, "long_mscale", inside=field),
    )


def _factors(values: Mapping[str, Any], name: str, field: str) -> tuple[float, ...]:
    factors = values.get(name)
    if not isinstance(factors, list) or not factors:
        raise InvalidCheckpoint(f"config.json: {field}.{name} must be a list of numbers, got {shown(factors)}")
    return tuple(number({name: factor}, name, inside=field) for factor in factors)
