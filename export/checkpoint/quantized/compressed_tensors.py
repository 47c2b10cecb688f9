"""Layers in the formats of compressed-tensors, which LLM Compressor and AutoRound write.

    pack-quantized        weight_packed I32, 2, 4 or 8 bits along the inputs; weight_shape [2]
    int-quantized         weight I8
    float-quantized       weight F8_E4M3                                    mxfp8-quantized alike
    nvfp4-pack-quantized  weight_packed U8 (e2m1); weight_scale F8; weight_global_scale divides
    mxfp4-pack-quantized  weight_packed U8 (e2m1); weight_scale U8 (powers of two)
    naive-quantized       one of the above, by the type of the weight

    all     weight_scale one, [N, 1], [N, groups] or blocks; weight_zero_point and weight_g_idx where there are some
    static  input_scale: of int8 inputs, the scale of this project's w8a8

The form of each layer is read off its tensors. Of the configuration, only what they do not say is needed.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown
from export.checkpoint.quantized.float8 import block_of, ending_in
from export.checkpoint.quantized.scaled_floats import FP8, read_scalar, read_scales, times_scales, unpack_e2m1
from export.checkpoint.quantized.settings import refuse_unknown, unsupported
from export.checkpoint.quantized.stored_layer import (
    StoredLayer,
    StoredLayers,
    container_bits,
    groups_in_order,
    in_container,
    unpack_words,
)
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.storage.quantized_rows import Codes
from runtime.errors import InvalidCheckpoint

_KNOWN = frozenset(
    {
        "quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status",
        "global_compression_ratio", "sparsity_config", "transform_config", "version", "run_compressed",
    }
)  # fmt: skip
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
_PARTS = (
    "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale",
)  # fmt: skip
_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
_KV_SCALES = ("k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale")
_PACKED_BITS = (2, 4, 8)


class _Groups(NamedTuple):
    """What the configuration's groups say together: bits of packed integers, and the block of scales in blocks.

    has_int8_inputs: whether every group rounds inputs to int8 with one static scale
    """

    bits: tuple[int, ...]
    block: tuple[int, int] | None
    has_int8_inputs: bool


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The layers, see config.py."""
    refuse_unknown(raw, _KNOWN)
    name = f"compressed-tensors in the format {shown(raw.get('format'))}"
    if raw.get("format") not in _FORMATS:
        raise unsupported(name)
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise unsupported(f"sparsity_config {shown(sparsity)}")
    if (raw.get("transform_config") or {}) not in ({}, {"config_groups": {}}):
        raise unsupported("transform_config: weights that were rotated for inputs rotated at run time")
    if raw.get("quantization_status", "compressed") != "compressed":
        raise unsupported(f"quantization_status {shown(raw['quantization_status'])}: save it compressed")
    groups = _groups(raw)
    layers = {module: _layer(plain, module, groups) for module in _modules(plain)}
    notes = []
    if raw.get("kv_cache_scheme"):
        notes.append(f"{plain.source}: the KV cache's scales are not used; --kv int8 has scales of its own")
    if skewed := [module for module in layers if _is_skewed(plain, module)]:
        notes.append(
            f"{plain.source}: {len(skewed)} layers have int8 inputs with a zero point; their inputs stay floats"
        )
    return StoredLayers(name=name, layers=layers, unused=ending_in(plain, _INPUTS + _KV_SCALES), notes=tuple(notes))


def _groups(raw: Mapping[str, Any]) -> _Groups:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise InvalidCheckpoint("config.json: quantization_config.config_groups must be an object of groups")
    bits, block, inputs = set(), None, []
    for group in groups.values():
        weights = group.get("weights") or {}
        if not isinstance(weights, dict):
            raise InvalidCheckpoint("config.json: quantization_config.config_groups: weights must be an object")
        if group.get("output_activations"):
            raise unsupported("output_activations: outputs of layers that are rounded at run time")
        if weights.get("type", "int") == "int":
            bits.add(weights.get("num_bits", 8))
        block = block_of(weights.get("block_structure"), "block_structure") or block
        inputs.append(group.get("input_activations") or {})
    if wrong := [number for number in bits if isinstance(number, bool) or number not in _PACKED_BITS]:
        raise unsupported(f"compressed-tensors weights of num_bits {shown(wrong[0])}")
    static = {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"}
    has_int8_inputs = all(
        isinstance(one, dict) and one and all((one.get(key) or value) == value for key, value in static.items())
        for one in inputs
    )
    return _Groups(tuple(sorted(bits)), block, has_int8_inputs)


def _modules(plain: SafetensorsCheckpoint) -> Iterator[str]:
    for name, info in plain.tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and info.dtype in ("I8", *FP8)):
            yield module


def _layer(plain: SafetensorsCheckpoint, module: str, groups: _Groups) -> StoredLayer:
    """The layer in the form that its tensors have."""
    parts = {part: f"{module}.{part}" for part in (*_PARTS, "weight") if f"{module}.{part}" in plain.tensors}
    if "weight_scale" not in parts:
        raise InvalidCheckpoint(f"{module} has no weight_scale: the checkpoint is not whole compressed-tensors")
    info = plain.tensors[parts.get("weight_packed", f"{module}.weight")]
    if len(info.shape) != 2:
        raise unsupported(f"{module}, a weight of the shape {list(info.shape)}")
    tensors, (n, width) = frozenset(parts.values()), info.shape
    if info.dtype == "U8":
        load = partial(_e2m1, plain, module, is_nv="weight_global_scale" in parts)
        return StoredLayer(shape=(n, width * 2), kind="fp4", tensors=tensors, weight=load)
    if info.dtype in FP8:
        return StoredLayer(
            shape=(n, width), kind="fp8", tensors=tensors, weight=partial(_fp8, plain, module, groups.block)
        )
    k, bits = width, 8
    if "weight_packed" in parts:
        k = _packed_inputs(plain, module, n)
        fitting = [number for number in groups.bits if -(-k * number // 32) == width]
        if info.dtype != "I32" or len(fitting) != 1:
            raise InvalidCheckpoint(
                f"{module}.weight_packed is {info.dtype} {list(info.shape)}; {k} inputs of {_told(groups.bits)} bits "
                f"are I32 {[[n, -(-k * number // 32)] for number in groups.bits]}"
            )
        bits = fitting[0]
    has_scale = groups.has_int8_inputs and f"{module}.input_scale" in plain.tensors and not _is_skewed(plain, module)
    is_rows = plain.tensors[parts["weight_scale"]].shape in ((n, 1), (n,), (1,), (), (1, 1))
    return StoredLayer(
        shape=(n, k),
        kind=f"compressed-tensors {bits} bits",
        tensors=tensors,
        bits=container_bits(bits),
        codes=partial(_codes, plain, module, bits, (n, k)),
        input_scale=partial(read_scalar, plain, f"{module}.input_scale") if has_scale and is_rows else None,
    )


def _packed_inputs(plain: SafetensorsCheckpoint, module: str, n: int) -> int:
    name = f"{module}.weight_shape"
    shape = plain.load_stored(name, "I64", "I32").tolist()
    if len(shape) != 2 or shape[0] != n or shape[1] < 1:
        raise InvalidCheckpoint(f"{name} says {shape}, and weight_packed has {n} rows")
    return int(shape[1])


def _is_skewed(plain: SafetensorsCheckpoint, module: str) -> bool:
    """Whether inputs are rounded with a zero point other than 0."""
    name = f"{module}.input_zero_point"
    return name in plain.tensors and bool(plain.load_stored(name, "I8", "U8", "I32", "F32").any())


def _codes(plain: SafetensorsCheckpoint, module: str, bits: int, shape: tuple[int, int]) -> Codes:
    n, k = shape
    if f"{module}.weight_packed" in plain.tensors:
        words = plain.load_stored(f"{module}.weight_packed", "I32")
        values = np.ascontiguousarray(unpack_words(words, bits)[:, :k])
    else:
        values = plain.load_stored(f"{module}.weight", "I8").view(np.uint8) ^ np.uint8(128)
    scales = plain.load(f"{module}.weight_scale")
    scales = np.broadcast_to(scales.reshape(-1, 1), (n, 1)) if scales.size in (1, n) else scales
    if scales.ndim != 2 or len(scales) != n or k % scales.shape[1]:
        raise InvalidCheckpoint(f"{module}.weight_scale {list(scales.shape)} does not fit a weight {[n, k]}")
    num_groups = scales.shape[1]
    zeros = _zero_points(plain, module, bits, (n, num_groups))
    group_of = groups_in_order(k, num_groups)
    if f"{module}.weight_g_idx" in plain.tensors:
        name = f"{module}.weight_g_idx"
        group_of = plain.load_stored(name, "I32", "I64").astype(np.int64)
        if group_of.shape != (k,) or group_of.min() < 0 or group_of.max() >= num_groups:
            raise InvalidCheckpoint(f"{name} must name one of {num_groups} groups for each of {k} inputs")
    return in_container(Codes(values, zeros, np.ascontiguousarray(scales), group_of), bits)


def _zero_points(plain: SafetensorsCheckpoint, module: str, bits: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Zero points in the unsigned form of the values: stored ones are signed, or packed along the outputs."""
    name, middle = f"{module}.weight_zero_point", 1 << (bits - 1)
    if name not in plain.tensors:
        return np.full(shape, middle, np.uint8)
    stored = plain.load_stored(name, "I32", "I8")
    if stored.dtype == np.int8:
        zeros = (stored.astype(np.int16) + middle).astype(np.uint8)
        zeros = np.broadcast_to(zeros.reshape(-1, 1), shape) if zeros.size in (1, shape[0]) else zeros
    else:
        zeros = unpack_words(np.ascontiguousarray(stored.T), bits)[:, : shape[0]].T
    if zeros.shape != shape:
        raise InvalidCheckpoint(f"{name} {list(stored.shape)} does not fit scales {list(shape)}")
    return np.ascontiguousarray(zeros)


def _fp8(plain: SafetensorsCheckpoint, module: str, block: tuple[int, int] | None) -> NDArray[np.float32]:
    weight = plain.load_stored(f"{module}.weight", *FP8).astype(np.float32)
    scales = read_scales(plain, f"{module}.weight_scale")
    is_blocks = block is not None and scales.size > 1 and len(scales) != len(weight)
    return times_scales(weight, scales, module, block=block if is_blocks else None)


def _e2m1(plain: SafetensorsCheckpoint, module: str, *, is_nv: bool) -> NDArray[np.float32]:
    weight = unpack_e2m1(plain.load_stored(f"{module}.weight_packed", "U8"))
    scales = read_scales(plain, f"{module}.weight_scale")
    if is_nv:
        scales = scales / np.float32(read_scalar(plain, f"{module}.weight_global_scale"))
    return times_scales(weight, scales, module)


def _told(bits: tuple[int, ...]) -> str:
    return " or ".join(map(str, bits))
