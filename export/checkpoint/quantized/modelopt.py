"""Layers that NVIDIA's ModelOpt has quantized, as its unified Hugging Face export writes them.

int8    weight I8 [N, K]       weight_scale [N]                    input_scale where inputs are static int8
int4    weight U8 [N/2, K]     weight_scale [N, groups]            outputs 2i and 2i + 1 in the low and high half
fp8     weight F8 [N, K]       weight_scale one, [N] or [N, K/32] as powers of two (mxfp8)
nvfp4   weight U8 [N, K/2]     weight_scale F8 [N, K/16]           weight_scale_2 multiplies; mxfp4 has none
all     pre_quant_scale [K] multiplies the inputs (AWQ), so here the weight's columns
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown
from export.checkpoint.quantized.float8 import ending_in
from export.checkpoint.quantized.scaled_floats import FP8, read_scalar, read_scales, times_scales, unpack_e2m1
from export.checkpoint.quantized.settings import refuse_unknown, unsupported
from export.checkpoint.quantized.stored_layer import StoredLayer, StoredLayers, groups_in_order, in_container
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.storage.quantized_rows import Codes
from runtime.errors import InvalidCheckpoint

_KNOWN = frozenset(
    {
        "quant_method", "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "producer", "quantization",
        "config_groups", "ignore", "exclude_modules", "group_size", "has_zero_point", "pre_quant_scale",
        "quantized_layers", "version",
    }
)  # fmt: skip
_PARTS = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")
_INT8_INPUTS = "W8A8_SQ_PER_CHANNEL"


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The layers, see config.py; the form of each is read off its tensors."""
    refuse_unknown(raw, _KNOWN)
    details = raw.get("quantization") or {}
    if not isinstance(details, dict):
        raise InvalidCheckpoint("hf_quant_config.json: quantization must be an object")
    algorithm = raw.get("quant_algo") or details.get("quant_algo")
    if raw.get("has_zero_point") or details.get("has_zero_point"):
        raise unsupported("modelopt with has_zero_point")
    layers = {}
    for name, info in plain.tensors.items():
        module = name.removesuffix(".weight")
        if module != name and (info.dtype in ("I8", "U8", *FP8)):
            layers[module] = _layer(plain, module, has_int8_inputs=algorithm == _INT8_INPUTS)
    has_kv = raw.get("kv_cache_quant_algo") or raw.get("kv_cache_scheme") or details.get("kv_cache_quant_algo")
    note = f"{plain.source}: the KV cache's scales are not used; --kv int8 has scales of its own"
    return StoredLayers(
        name=f"modelopt {shown(algorithm)}",
        layers=layers,
        unused=ending_in(plain, ("input_scale", "k_scale", "v_scale")),
        notes=(note,) if has_kv else (),
    )


def _layer(plain: SafetensorsCheckpoint, module: str, *, has_int8_inputs: bool) -> StoredLayer:
    parts = {part: f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in plain.tensors}
    info = plain.tensors[parts["weight"]]
    if "weight_scale" not in parts or len(info.shape) != 2:
        what = f"has the shape {list(info.shape)}" if "weight_scale" in parts else "has no weight_scale"
        raise InvalidCheckpoint(f"{module}.weight is {info.dtype} and {what}; the checkpoint is not whole modelopt")
    (n, k), tensors = info.shape, frozenset(parts.values())
    scales = plain.tensors[parts["weight_scale"]].shape
    is_scaled = "pre_quant_scale" in parts
    if info.dtype in FP8:
        return StoredLayer(shape=(n, k), kind="fp8", tensors=tensors, weight=partial(_scaled, plain, module, _fp8))
    if info.dtype == "U8" and len(scales) == 2 and scales[0] == n:
        load = partial(_scaled, plain, module, _e2m1)
        return StoredLayer(shape=(n, 2 * k), kind="fp4", tensors=tensors, weight=load)
    if info.dtype == "U8":
        if "weight_scale_2" in parts:
            raise unsupported(f"modelopt int4 with scales in fp8 ({module}.weight_scale_2)")
        shape, bits, codes = (2 * n, k), 4, partial(_int4, plain, module)
    else:
        shape, bits, codes = (n, k), 8, partial(_int8, plain, module)
    if is_scaled:
        load = partial(_scaled, plain, module, lambda *_: codes().dequantized())
        return StoredLayer(shape=shape, kind=f"modelopt AWQ int{bits}", tensors=tensors, weight=load)
    scale_name = f"{module}.input_scale"
    has_scale = bits == 8 and has_int8_inputs and scale_name in plain.tensors
    return StoredLayer(
        shape=shape,
        kind=f"modelopt int{bits}",
        tensors=tensors,
        bits=bits,
        codes=codes,
        input_scale=partial(read_scalar, plain, scale_name) if has_scale else None,
    )


def _scaled(plain: SafetensorsCheckpoint, module: str, load: Any) -> NDArray[np.float32]:
    """The weight, times the factors of its inputs where they are applied at run time."""
    weight: NDArray[np.float32] = load(plain, module)
    name = f"{module}.pre_quant_scale"
    if name in plain.tensors:
        factors = plain.load(name).reshape(-1)
        if factors.shape != weight.shape[1:]:
            raise InvalidCheckpoint(f"{name} has {factors.size} values for {weight.shape[1]} inputs")
        weight = weight * factors
    return weight


def _fp8(plain: SafetensorsCheckpoint, module: str) -> NDArray[np.float32]:
    weight = plain.load_stored(f"{module}.weight", *FP8).astype(np.float32)
    return times_scales(weight, read_scales(plain, f"{module}.weight_scale"), module)


def _e2m1(plain: SafetensorsCheckpoint, module: str) -> NDArray[np.float32]:
    weight, scales = (
        unpack_e2m1(plain.load_stored(f"{module}.weight", "U8")),
        read_scales(plain, f"{module}.weight_scale"),
    )
    if f"{module}.weight_scale_2" in plain.tensors:
        scales = scales * np.float32(read_scalar(plain, f"{module}.weight_scale_2"))
    return times_scales(weight, scales, module)


def _int4(plain: SafetensorsCheckpoint, module: str) -> Codes:
    packed = plain.load_stored(f"{module}.weight", "U8")
    halves = np.stack([packed & 15, packed >> 4], 1).reshape(2 * len(packed), -1)  # two's complement
    return _symmetric(plain, module, halves ^ np.uint8(8), 4)


def _int8(plain: SafetensorsCheckpoint, module: str) -> Codes:
    values = plain.load_stored(f"{module}.weight", "I8").view(np.uint8)
    return _symmetric(plain, module, values ^ np.uint8(128), 8)


def _symmetric(plain: SafetensorsCheckpoint, module: str, values: NDArray[np.uint8], bits: int) -> Codes:
    n, k = values.shape
    scales = plain.load(f"{module}.weight_scale")
    scales = np.broadcast_to(scales.reshape(-1, 1), (n, 1)) if scales.size in (1, n) else scales
    if scales.ndim != 2 or len(scales) != n or k % scales.shape[1]:
        raise InvalidCheckpoint(f"{module}.weight_scale {list(scales.shape)} does not fit a weight {[n, k]}")
    zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    return in_container(Codes(values, zeros, np.ascontiguousarray(scales), groups_in_order(k, scales.shape[1])), bits)
