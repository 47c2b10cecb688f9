"""Reads `quantization_config` of config.json: which GPTQ or AWQ scheme the weights are stored in.

Refuses every other scheme by name. Knows the configuration, not the tensors.

    gptq   AutoGPTQ, GPTQModel, Optimum: 4 or 8 bits, symmetric or not, act-order or not; formats gptq and gptq_v2
    awq    AutoAWQ: 4 bits, version gemm
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.checkpoint.config_fields import shown
from runtime.errors import InvalidCheckpoint, UnsupportedModel

# How the tool quantized, and which kernel it expects: neither changes the weights.
_NO_EFFECT = frozenset(
    {
        "quant_method", "desc_act", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups",
        "lm_head", "model_name_or_path", "model_file_base_name", "meta", "tokenizer", "dataset", "batch_size",
        "pad_token_id",
        "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize",
        "modules_to_not_convert", "modules_to_fuse", "disable_exllama", "use_exllama", "exllama_config",
        "exllama_version",
        "max_input_length", "cache_block_outputs", "use_cuda_fp16", "model_seqlen", "backend", "v2", "mse", "do_fuse",
        "fuse_max_seq_len", "parallel_packing", "device", "offload_to_disk", "provider", "quantizer", "task",
    }
)  # fmt: skip

_READ = frozenset(
    {
        "bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "checkpoint_format", "format", "version",
        "is_marlin_format", "dynamic", "adapter", "pack_dtype",
    }
)  # fmt: skip

SUPPORTED = "gptq (4 or 8 bits, formats gptq and gptq_v2) and awq (4 bits, version gemm)"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScheme:
    """How a checkpoint's linear layers are stored.

    group_size: inputs that share a scale; None is the whole row
    symmetric: the configuration says that every zero point is the middle
    checkpoint_format: `gptq` stores zero points minus one, `gptq_v2` as they are
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
    """The scheme of a `quantization_config`. UnsupportedModel names what is not supported, and lists what is."""
    if not isinstance(raw, dict):
        raise InvalidCheckpoint(f"config.json: quantization_config is a {type(raw).__name__}, not an object")
    method = raw.get("quant_method")
    reader = {"gptq": _gptq, "awq": _awq}.get(method) if isinstance(method, str) else None
    if reader is None:
        raise _unsupported(f"quant_method {shown(method)}")
    scheme = reader(raw)
    for name, value in raw.items():
        if name not in _READ | _NO_EFFECT and value is not None and value is not False and value not in ("", [], {}):
            raise _unsupported(f"{name} = {shown(value)}")
    return scheme


def _gptq(raw: Mapping[str, Any]) -> StoredScheme:
    bits = _one_of(raw, ("bits",), (4, 8), default=None)
    stored = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise _unsupported(f"gptq in checkpoint_format {shown(stored)}")
    for key in ("is_marlin_format", "dynamic", "adapter"):
        if raw.get(key):
            raise _unsupported(f"gptq with {key} {shown(raw[key])}")
    if raw.get("pack_dtype", "int32") != "int32":
        raise _unsupported(f"gptq with pack_dtype {shown(raw['pack_dtype'])}")
    return StoredScheme(
        method="gptq",
        bits=bits,
        group_size=_group_size(raw, ("group_size",)),
        symmetric=_flag(raw, "sym"),
        checkpoint_format=stored,
    )


def _awq(raw: Mapping[str, Any]) -> StoredScheme:
    bits = _one_of(raw, ("bits", "w_bit"), (4,), default=4)
    if not _flag(raw, "zero_point"):
        raise _unsupported("awq without zero points (zero_point: false)")
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(f"awq in version {shown(version)}")
    return StoredScheme(
        method="awq",
        bits=bits,
        group_size=_group_size(raw, ("group_size", "q_group_size")),
        symmetric=False,
        checkpoint_format=version,
    )


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    """A switch that is true by default."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidCheckpoint(f"config.json: quantization_config.{key} must be true or false, got {shown(value)}")
    return value is not False


def _one_of(raw: Mapping[str, Any], keys: tuple[str, ...], allowed: tuple[int, ...], default: int | None) -> int:
    value = next((raw[key] for key in keys if raw.get(key) is not None), default)
    if isinstance(value, bool) or value not in allowed:
        raise _unsupported(f"{raw['quant_method']} with {keys[0]} {shown(value)}")
    return int(value)


def _group_size(raw: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    value = next((raw[key] for key in keys if raw.get(key) is not None), 128)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise InvalidCheckpoint(
            f"config.json: quantization_config.{keys[0]} must be -1 or at least 1, got {shown(value)}"
        )
    return None if value == -1 else value


def _unsupported(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"config.json has quantization_config with {what}, which is not imported; imported are {SUPPORTED}: "
        "give one of those, the original fp32, fp16 or bf16 checkpoint, or a GGUF file"
    )
