"""Layers that HQQ has quantized, as transformers saved them in safetensors.

    W_q      uint8, or int32 for 3 bits: the values [R, C], R cut into equal parts that share a byte, the first highest
    scale    axis 1: a row of W_q's values is a group of a row of the weight; axis 0: a column is
    weight = (value - zero) * scale, flat, in the shape `shape`

Zero points are fractions, so the weights become floats. HQQ's own files (`qmodel.pt`) are pickles and are not read.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.quantized.settings import refuse_unknown, unsupported
from export.checkpoint.quantized.stored_layer import StoredLayer, StoredLayers
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from runtime.errors import InvalidCheckpoint

_SETTINGS = (
    "W_q", "scale", "zero", "shape", "nbits", "axis", "group_size", "packing", "view_as_float", "unpack_view_dtype",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_KNOWN = frozenset({"quant_method", "quant_config", "skip_modules"})
_SHIFTS = {
    8: (0,),
    4: (4, 0),
    3: (27, 24, 21, 18, 15, 12, 9, 6, 3, 0),
    2: (6, 4, 2, 0),
    1: (7, 6, 5, 4, 3, 2, 1, 0),
}


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The layers, see config.py."""
    refuse_unknown(raw, _KNOWN)
    modules = [name.removesuffix(".W_q") for name in plain.tensors if name.endswith(".W_q")]
    return StoredLayers(name="hqq", layers={module: _layer(plain, module) for module in modules})


def _layer(plain: SafetensorsCheckpoint, module: str) -> StoredLayer:
    names = {part: f"{module}.{part}" for part in _SETTINGS if f"{module}.{part}" in plain.tensors}
    if missing := [part for part in ("scale", "zero", "shape", "nbits") if part not in names]:
        raise InvalidCheckpoint(f"{module} has W_q and no {', '.join(missing)}; the checkpoint is not whole hqq")
    for switch in ("quant_scale", "quant_zero", "view_as_float"):
        if switch in names and plain.load_stored(names[switch], "U8").any():
            raise unsupported(f"hqq with {switch} ({module})")
    bits = int(_first(plain, names["nbits"]))
    shape = plain.load_stored(names["shape"], "I64", "I32").tolist()
    if bits not in _SHIFTS or len(shape) != 2 or min(shape) < 1:
        raise InvalidCheckpoint(f"{module}: nbits {bits} and shape {shape} are not those of an hqq matrix")
    return StoredLayer(
        shape=(shape[0], shape[1]),
        kind=f"hqq {bits} bits",
        tensors=frozenset(names.values()),
        weight=partial(_load, plain, module, bits, (shape[0], shape[1])),
    )


def _first(plain: SafetensorsCheckpoint, name: str) -> float:
    values = plain.load_stored(name, "I32", "I64", "U8", "F32").reshape(-1)
    if values.size != 1:
        raise InvalidCheckpoint(f"{name} must be one number, and has {values.size}")
    return float(values[0])


def _load(plain: SafetensorsCheckpoint, module: str, bits: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    packed = plain.load_stored(f"{module}.W_q", "U8", "I32")
    scale, zero = plain.load(f"{module}.scale"), plain.load(f"{module}.zero")
    mask = (1 << bits) - 1
    if packed.ndim != 2:
        raise InvalidCheckpoint(f"{module}.W_q has the shape {list(packed.shape)}; it must have two dimensions")
    values = np.concatenate([(packed >> shift) & mask for shift in _SHIFTS[bits]]).astype(np.float32)
    num_rows = shape[0] * shape[1] // values.shape[1]  # 3 bits: the last part is filled up
    values = values[:num_rows]
    if values.size != shape[0] * shape[1] or scale.shape != zero.shape:
        raise InvalidCheckpoint(f"{module}: W_q {list(packed.shape)} of {bits} bits does not fit {list(shape)}")
    try:
        values -= zero
        values *= scale
    except ValueError as error:
        raise InvalidCheckpoint(f"{module}: scale {list(scale.shape)} does not fit W_q ({error})") from error
    return values.reshape(shape)
