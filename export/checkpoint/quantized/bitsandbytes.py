"""Layers that bitsandbytes has quantized, as `save_pretrained` writes them.

    8 bits  weight int8 [N, K]   SCB float32 [N]: the largest value of each row, so weight = value * SCB / 127
    4 bits  weight uint8 [N * K / 2, 1], the first of two in the high half; quant_map float32 [16]
            absmax for each block of the flat weight; if it is nested, nested_quant_map[absmax] * nested_absmax + offset

The 8-bit integers are kept. nf4 and fp4 have uneven steps, so they become floats.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.quantized.settings import refuse_unknown, unsupported
from export.checkpoint.quantized.stored_layer import StoredLayer, StoredLayers
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.storage.quantized_rows import Codes
from runtime.errors import InvalidCheckpoint

_KNOWN = frozenset({"quant_method", "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit"})
_KIND = "weight.quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The layers, see config.py. 4-bit layers are recognized by their state, 8-bit ones by SCB."""
    known = _KNOWN | {name for name in raw if name.startswith(("bnb_4bit_", "llm_int8_"))}
    refuse_unknown(raw, frozenset(known))
    layers: dict[str, StoredLayer] = {}
    for name in plain.tensors:
        module, _, kind = name.partition(f".{_KIND}")
        if kind:
            layers[module] = _four_bits(plain, module, kind)
        elif name.endswith(".SCB"):
            layers[name.removesuffix(".SCB")] = _eight_bits(plain, name.removesuffix(".SCB"))
    return StoredLayers(name="bitsandbytes", layers=layers)


def _eight_bits(plain: SafetensorsCheckpoint, module: str) -> StoredLayer:
    info, scales = plain.tensors.get(f"{module}.weight"), plain.tensors[f"{module}.SCB"]
    if info is None or info.dtype != "I8" or len(info.shape) != 2 or scales.shape != info.shape[:1]:
        stored = "is not there" if info is None else f"is {info.dtype} {list(info.shape)}"
        raise InvalidCheckpoint(
            f"{module}.weight {stored}, and SCB {list(scales.shape)} means one of int8 [rows, columns]"
        )
    layout = f"{module}.weight_format"
    if layout in plain.tensors and plain.load_stored(layout, "U8").any():
        raise unsupported(f"bitsandbytes weights in another order than rows ({layout})")

    def codes() -> Codes:
        values = (plain.load_stored(f"{module}.weight", "I8").view(np.uint8) ^ np.uint8(128)).astype(np.uint8)
        scale = plain.load(f"{module}.SCB")[:, None] / np.float32(127)
        return Codes(values, np.full(scale.shape, 128, np.uint8), scale, np.zeros(values.shape[1], np.int64))

    tensors = frozenset({f"{module}.weight", f"{module}.SCB", layout})
    n, k = info.shape
    return StoredLayer(shape=(n, k), kind="bitsandbytes 8 bits", tensors=tensors, bits=8, codes=codes)


def _four_bits(plain: SafetensorsCheckpoint, module: str, kind: str) -> StoredLayer:
    state_name = f"{module}.{_KIND}{kind}"
    try:
        state = json.loads(plain.load_stored(state_name, "U8").tobytes())
        n, k = (int(size) for size in state["shape"])
        block, nested_block = int(state["blocksize"]), int(state.get("nested_blocksize", 1))
        offset = np.float32(state.get("nested_offset", 0))
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidCheckpoint(f"{state_name} does not hold the state of a {kind} matrix: {error!r}") from error
    packed = plain.tensors.get(f"{module}.weight")
    num_bytes = -(-n * k // 2)
    if packed is None or packed.dtype != "U8" or int(np.prod(packed.shape)) != num_bytes or block < 1:
        stored = "is not there" if packed is None else f"is {packed.dtype} {list(packed.shape)}"
        raise InvalidCheckpoint(f"{module}.weight {stored}; a {kind} matrix {[n, k]} has {num_bytes} bytes (U8)")
    parts = {part: f"{module}.weight.{part}" for part in _PARTS}
    is_nested = parts["nested_absmax"] in plain.tensors

    def load() -> NDArray[np.float32]:
        highest = plain.load_stored(parts["absmax"], "U8") if is_nested else plain.load(parts["absmax"])
        if is_nested:
            table, outer = plain.load(parts["nested_quant_map"]), plain.load(parts["nested_absmax"])
            highest = table[highest] * np.repeat(outer, nested_block)[: highest.size] + offset
        _check_size(module, highest.size, -(-n * k // block), "absmax")
        halves = plain.load_stored(f"{module}.weight", "U8").reshape(-1)
        values = plain.load(parts["quant_map"])[np.stack([halves >> 4, halves & 15], -1).reshape(-1)[: n * k]]
        values *= np.repeat(highest, block)[: n * k]
        return values.reshape(n, k)

    tensors = frozenset({f"{module}.weight", state_name, *parts.values()})
    return StoredLayer(shape=(n, k), kind=f"bitsandbytes {kind}", tensors=tensors, weight=load)


def _check_size(module: str, found: int, wanted: int, part: str) -> None:
    if found != wanted:
        raise InvalidCheckpoint(f"{module}.weight.{part} has {found} values, and its blocks are {wanted}")
