"""Reads single settings of a `quantization_config`, and refuses those that are not supported, by name."""

from collections.abc import Mapping
from typing import Any

from export.checkpoint.config_fields import shown
from runtime.errors import InvalidCheckpoint, UnsupportedModel

SUPPORTED = (
    "gptq (2, 3, 4 or 8 bits, formats gptq and gptq_v2), awq (4 bits, version gemm), auto-round, compressed-tensors, "
    "bitsandbytes, fp8, modelopt and hqq"
)


def unsupported(what: str) -> UnsupportedModel:
    """The error for a quantization or a setting that has no reader."""
    return UnsupportedModel(
        f"config.json has quantization_config with {what}, which is not imported; imported are {SUPPORTED}: "
        "give one of those, the original fp32, fp16 or bf16 checkpoint, or a GGUF file"
    )


def refuse_unknown(raw: Mapping[str, Any], known: frozenset[str]) -> None:
    """UnsupportedModel for a setting outside `known` that is switched on: it may change what the weights mean."""
    for name, value in raw.items():
        if name not in known and value is not None and value is not False and value not in ("", [], {}):
            raise unsupported(f"{name} = {shown(value)}")


def flag(raw: Mapping[str, Any], key: str, *, default: bool = True) -> bool:
    """A switch; InvalidCheckpoint for another type."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidCheckpoint(f"config.json: quantization_config.{key} must be true or false, got {shown(value)}")
    return default if value is None else value


def one_of(raw: Mapping[str, Any], keys: tuple[str, ...], allowed: tuple[int, ...], default: int | None) -> int:
    """The first of `keys` that is there, one of `allowed`; UnsupportedModel otherwise."""
    value = next((raw[key] for key in keys if raw.get(key) is not None), default)
    if isinstance(value, bool) or value not in allowed:
        raise unsupported(f"{raw.get('quant_method')} with {keys[0]} {shown(value)}")
    return int(value)


def group_size(raw: Mapping[str, Any], keys: tuple[str, ...], default: int = 128) -> int | None:
    """Inputs that share a scale; None, stored as -1, is the whole row. InvalidCheckpoint for another value."""
    value = next((raw[key] for key in keys if raw.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise InvalidCheckpoint(
            f"config.json: quantization_config.{keys[0]} must be -1 or at least 1, got {shown(value)}"
        )
    return None if value == -1 else value
