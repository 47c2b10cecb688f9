"""Finds out which tool quantized a checkpoint, and hands the checkpoint to that format's module.

Refuses every other format by name.

    gptq, awq, auto-round   gptq_awq.py            packed integers
    compressed-tensors      compressed_tensors.py  packed integers, int8, fp8 and fp4
    bitsandbytes            bitsandbytes.py        int8, nf4 and fp4
    fp8, fbgemm_fp8         float8.py              fp8 with a scale for each block, row or matrix
    modelopt                modelopt.py            int8, int4, fp8 and nvfp4
    mxfp4                   mxfp4.py               experts in fp4, as gpt-oss stores them
    hqq                     hqq.py                 1 to 8 bits with zero points between the integers
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from export.checkpoint.config_fields import shown
from export.checkpoint.quantized.settings import unsupported
from export.checkpoint.quantized.stored_layer import StoredLayers
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.checkpoint.texts.reading import parse_json_object
from runtime.errors import InvalidCheckpoint

FindLayers = Callable[[SafetensorsCheckpoint, Mapping[str, Any]], StoredLayers]
"""Reads `quantization_config` and the tensors' headers. UnsupportedModel for a setting without a reader,
InvalidCheckpoint for tensors that do not fit the configuration."""

FORMATS: Mapping[str, str] = {
    "gptq": "gptq_awq",
    "awq": "gptq_awq",
    "auto-round": "gptq_awq",
    "intel/auto-round": "gptq_awq",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "fp8": "float8",
    "fbgemm_fp8": "float8",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
    "hqq": "hqq",
    "mxfp4": "mxfp4",
}
"""Module of this folder for each `quant_method`."""

_MODELOPT_FILE = "hf_quant_config.json"


def quantization_of(plain: SafetensorsCheckpoint) -> Mapping[str, Any] | None:
    """The configuration of the tool that quantized a checkpoint; None if none did.

    Usually config.json's `quantization_config`. Older releases of ModelOpt wrote only a file of their own.
    """
    raw = plain.config.get("quantization_config")
    if raw is None:
        text = plain.text_file(_MODELOPT_FILE)
        if text is None:
            return None
        raw = {"quant_method": "modelopt", **parse_json_object(text, _MODELOPT_FILE)}
    if not isinstance(raw, dict):
        raise InvalidCheckpoint(f"config.json: quantization_config is a {type(raw).__name__}, not an object")
    return raw


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The quantized layers. UnsupportedModel names what is not imported; InvalidCheckpoint for a checkpoint that is
    not what its configuration says."""
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise unsupported(f"quant_method {shown(method)}")
    module = import_module(f"export.checkpoint.quantized.{FORMATS[method]}")
    found: StoredLayers = module.find_layers(plain, raw)
    if not found.layers:
        raise InvalidCheckpoint(
            f"config.json says {found.name}, and no tensor is stored like that; the checkpoint is in another format"
        )
    return found
