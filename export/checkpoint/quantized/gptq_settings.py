"""The settings of GPTQ, AWQ and AutoRound: how each packed layer is stored.

gptq         AutoGPTQ, GPTQModel, Optimum: symmetric or not, act-order or not; formats gptq and gptq_v2
awq          AutoAWQ: version gemm
auto-round   AutoRound: packed as one of the two, with other settings for single layers
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from export.checkpoint.config_fields import shown
from export.checkpoint.quantized.settings import flag, group_size, one_of, refuse_unknown, unsupported
from runtime.errors import InvalidCheckpoint

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
        "method", "act_group_aware", "quant_lm_head", "autoround_version", "autoround", "auto_round_version",
        "to_quant_block_names", "quant_block_list", "ignore_layers", "layer_config",
        # AutoRound's optimizer
        "iters", "lr", "minmax_lr", "nblocks", "nsamples", "seqlen", "amp", "scale_dtype", "low_gpu_mem_usage",
        "low_cpu_mem_usage", "enable_minmax_tuning", "enable_quanted_input", "enable_norm_bias_tuning", "use_opt_rtn",
        "enable_opt_rtn", "disable_opt_rtn", "gradient_accumulate_steps", "enable_alg_ext", "train_bs", "n_blocks",
        "not_use_best_mse", "dynamic_max_gap", "batch_dim", "infer_bs_coeff", "enable_torch_compile", "seed",
    }
)  # fmt: skip

_READ = frozenset(
    {
        "bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "checkpoint_format", "format", "version",
        "is_marlin_format", "dynamic", "adapter", "pack_dtype", "packing_format", "extra_config", "data_type",
        "act_bits", "act_data_type", "act_group_size", "act_sym", "act_dynamic", "super_bits", "super_group_size",
    }
)  # fmt: skip

_GPTQ_BITS = (2, 3, 4, 8)
_AUTO_ROUND_PACKINGS = {"auto_gptq": "gptq", "gptqmodel": "gptq_v2", "": "gptq_v2", "auto_awq": "gemm"}
"""What follows `auto_round:` in packing_format, and its checkpoint_format here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a layer is stored.

    group_size: inputs that share a scale; None is the whole row
    symmetric: the configuration says that every zero point is the middle
    checkpoint_format: `gptq` stores zero points minus one, `gptq_v2` and `gemm` as they are
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

    @property
    def is_awq(self) -> bool:
        return self.checkpoint_format == "gemm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packings:
    """The usual packing, and changes to it by a module's name or a regular expression of names."""

    usual: Packing
    changes: Mapping[str, Mapping[str, Any]]

    def of(self, module: str) -> Packing:
        """The packing of a layer. UnsupportedModel for a change that is not known."""
        found = self.changes.get(module)
        if found is None:
            found = next((change for name, change in self.changes.items() if _matches(name, module)), {})
        if not found:
            return self.usual
        raw = {"quant_method": self.usual.method, **found}
        refuse_unknown(raw, _READ | _NO_EFFECT)
        _refuse_activations(raw)
        bits = one_of(raw, ("bits",), (4,) if self.usual.is_awq else _GPTQ_BITS, default=self.usual.bits)
        size = group_size(raw, ("group_size",)) if "group_size" in raw else self.usual.group_size
        symmetric = flag(raw, "sym", default=self.usual.symmetric)
        return replace(self.usual, bits=bits, group_size=size, symmetric=symmetric)


def parse_packings(raw: Mapping[str, Any]) -> Packings:
    """The packings of a `quantization_config`. UnsupportedModel names what is not supported, and lists what is."""
    readers = {"gptq": _gptq, "awq": _awq, "auto-round": _auto_round, "intel/auto-round": _auto_round}
    packings = readers[raw["quant_method"]](raw)
    refuse_unknown(raw, _READ | _NO_EFFECT)
    return packings


def _gptq(raw: Mapping[str, Any]) -> Packings:
    bits = one_of(raw, ("bits",), _GPTQ_BITS, default=None)
    stored = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise unsupported(f"gptq in checkpoint_format {shown(stored)}")
    for key in ("is_marlin_format", "adapter"):
        if raw.get(key):
            raise unsupported(f"gptq with {key} {shown(raw[key])}")
    if raw.get("pack_dtype", "int32") != "int32":
        raise unsupported(f"gptq with pack_dtype {shown(raw['pack_dtype'])}")
    usual = Packing(
        method="gptq",
        bits=bits,
        group_size=group_size(raw, ("group_size",)),
        symmetric=flag(raw, "sym"),
        checkpoint_format=stored,
    )
    dynamic = _changes(raw, "dynamic")
    # `-:` names layers that are not quantized. Of the others, `+:` is only an emphasis.
    return Packings(
        usual=usual, changes={name.removeprefix("+:"): to for name, to in dynamic.items() if not name.startswith("-:")}
    )


def _awq(raw: Mapping[str, Any]) -> Packings:
    bits = one_of(raw, ("bits", "w_bit"), (4,), default=4)
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if version != "gemm":
        raise unsupported(f"awq in version {shown(version)}")
    usual = Packing(
        method="awq",
        bits=bits,
        group_size=group_size(raw, ("group_size", "q_group_size")),
        symmetric=False,  # without zero_point, the stored ones are all the middle
        checkpoint_format=version,
    )
    return Packings(usual=usual, changes={})


def _auto_round(raw: Mapping[str, Any]) -> Packings:
    packing = str(raw.get("packing_format") or "auto_round:auto_gptq").removeprefix("auto_round").removeprefix(":")
    if packing not in _AUTO_ROUND_PACKINGS:
        raise unsupported(f"auto-round in packing_format {shown(raw.get('packing_format'))}")
    _refuse_activations(raw)
    stored = _AUTO_ROUND_PACKINGS[packing]
    usual = Packing(
        method="auto-round",
        bits=one_of(raw, ("bits",), (4,) if stored == "gemm" else _GPTQ_BITS, default=4),
        group_size=group_size(raw, ("group_size",)),
        symmetric=flag(raw, "sym") and stored != "gemm",
        checkpoint_format=stored,
    )
    return Packings(usual=usual, changes=_changes(raw, "extra_config"))


def _refuse_activations(raw: Mapping[str, Any]) -> None:
    """UnsupportedModel for AutoRound's other kinds of numbers."""
    if not str(raw.get("data_type") or "int").startswith("int"):
        raise unsupported(f"auto-round with data_type {shown(raw['data_type'])}")
    for key in ("super_bits", "super_group_size"):
        if raw.get(key):
            raise unsupported(f"auto-round with {key} {shown(raw[key])}")
    act_bits = raw.get("act_bits") or 16
    if not isinstance(act_bits, int) or act_bits < 16:
        raise unsupported(f"auto-round with act_bits {shown(act_bits)}")


def _changes(raw: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    found = raw.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(change, dict) for change in found.values()):
        raise InvalidCheckpoint(f"config.json: quantization_config.{key} must name settings of modules")
    return found


def _matches(name: str, module: str) -> bool:
    """Whether a regular expression, or else a plain name, means the module."""
    try:
        return re.match(name, module) is not None
    except re.error:
        return False
