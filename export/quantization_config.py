"""What config.json's `quantization_config` says about weights that are quantized already: read, or refused by name.

Two tools' formats are imported. Knows the words of the configuration, not the tensors.

    gptq   AutoGPTQ, GPTQModel, Optimum: 4 or 8 bits, symmetric or not, act-order or not; formats gptq and gptq_v2
    awq    AutoAWQ: 4 bits, version gemm
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidCheckpoint, UnsupportedModel

SUPPORTED = "gptq (4 or 8 bits, formats gptq and gptq_v2) and awq (4 bits, version gemm)"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScheme:
    """How a checkpoint's linear layers are stored.

    group_size: inputs that share a scale; None is the whole row
    symmetric: the zero point is the middle everywhere, by the configuration's word
    checkpoint_format: of gptq: gptq keeps zero points less one, gptq_v2 as they are
    """

    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    checkpoint_format: str

    @property
    def name(self) -> str:
        group = "row" if self.group_size is None else f"group of {self.group_size}"
        return f"{self.method}, {self.bits} bits, a scale per {group}"


def parse_quantization(raw: object) -> StoredScheme:
    """The scheme of a `quantization_config`; UnsupportedModel names what is not read, and lists what is."""
    if not isinstance(raw, dict):
        raise InvalidCheckpoint(f"config.json: quantization_config is a {type(raw).__name__}, not an object")
    method = raw.get("quant_method")
    reader = {"gptq": _gptq, "awq": _awq}.get(method) if isinstance(method, str) else None
    if reader is None:
        raise _unsupported(f"quant_method {method!r}")
    return reader(raw)


def _gptq(raw: Mapping[str, Any]) -> StoredScheme:
    bits = _one_of(raw, ("bits",), (4, 8), default=None)
    stored = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise _unsupported(f"gptq in checkpoint_format {stored!r}")
    for key in ("is_marlin_format", "dynamic", "adapter"):
        if raw.get(key):
            raise _unsupported(f"gptq with {key} {raw[key]!r}")
    if raw.get("pack_dtype", "int32") != "int32":
        raise _unsupported(f"gptq with pack_dtype {raw['pack_dtype']!r}")
    return StoredScheme(
        method="gptq",
        bits=bits,
        group_size=_group_size(raw, ("group_size",)),
        symmetric=raw.get("sym") is not False,
        checkpoint_format=stored,
    )


def _awq(raw: Mapping[str, Any]) -> StoredScheme:
    bits = _one_of(raw, ("bits", "w_bit"), (4,), default=4)
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(f"awq in version {version!r}")
    return StoredScheme(
        method="awq",
        bits=bits,
        group_size=_group_size(raw, ("group_size", "q_group_size")),
        symmetric=False,
        checkpoint_format=version,
    )


def _one_of(raw: Mapping[str, Any], keys: tuple[str, ...], allowed: tuple[int, ...], default: int | None) -> int:
    value = next((raw[key] for key in keys if raw.get(key) is not None), default)
    if isinstance(value, bool) or value not in allowed:
        raise _unsupported(f"{raw['quant_method']} with {keys[0]} {value!r}")
    return int(value)


def _group_size(raw: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    value = next((raw[key] for key in keys if raw.get(key) is not None), 128)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise InvalidCheckpoint(f"config.json: quantization_config.{keys[0]} must be -1 or at least 1, got {value!r}")
    return None if value == -1 else value


def _unsupported(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"config.json has quantization_config with {what}, which is not imported; imported are {SUPPORTED}: "
        "give one of those, the original fp32, fp16 or bf16 checkpoint, or a GGUF file"
    )
