"""Experts in MXFP4, as gpt-oss stores them: e2m1 floats with a power of two for each 32 inputs.

    experts.gate_up_proj_blocks  U8 [experts, outputs, inputs / 32, 16], two floats to a byte, the first in the low half
    experts.gate_up_proj_scales  U8 [experts, outputs, inputs / 32], the exponent plus 127

Outputs of gate and up take turns. Twice an e2m1 float is an integer from -12 to 12, so blocks of 8-bit integers hold
the same values (OCP Microscaling Formats, version 1.0).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from export.checkpoint.quantized.settings import refuse_unknown
from export.checkpoint.quantized.stored_layer import StoredLayer, StoredLayers, groups_in_order
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.storage.quantized_rows import Codes
from runtime.errors import InvalidCheckpoint

_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)
_MIDDLE = 128
_NOT_A_NUMBER = 255
_BLOCKS, _SCALES = "_blocks", "_scales"
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """One layer for each matrix of each expert, see config.py."""
    refuse_unknown(raw, _KNOWN)
    layers = dict(layer for name in plain.tensors if name.endswith(_BLOCKS) for layer in _experts_of(plain, name))
    return StoredLayers(name="mxfp4 experts", layers=layers)


def _experts_of(plain: SafetensorsCheckpoint, blocks: str) -> Iterator[tuple[str, StoredLayer]]:
    """The layers in one tensor, by module name."""
    scales = blocks.removesuffix(_BLOCKS) + _SCALES
    before, _, fused = blocks.removesuffix(_BLOCKS).rpartition(".")
    shape = plain.tensors[blocks].shape
    found = plain.tensors[scales].shape if scales in plain.tensors else None
    parts = _PARTS.get(fused, ())
    if len(shape) != 4 or shape[3] != 16 or found != shape[:3] or not parts or shape[1] % len(parts):
        raise InvalidCheckpoint(f"{blocks} {list(shape)} with {scales} {found}: not experts in mxfp4")
    num_outputs, num_inputs = shape[1] // len(parts), shape[2] * 32
    for expert in range(shape[0]):
        for place, part in enumerate(parts):
            codes = partial(_codes, plain, (blocks, scales), expert, slice(place, None, len(parts)))
            yield (
                f"{before}.{expert}.{part}",
                StoredLayer(
                    shape=(num_outputs, num_inputs),
                    kind="mxfp4",
                    tensors=frozenset({blocks, scales}),
                    bits=8,
                    codes=codes,
                ),
            )


def _codes(plain: SafetensorsCheckpoint, names: tuple[str, str], expert: int, outputs: slice) -> Codes:
    """The integers of some outputs of one expert."""
    blocks, exponents = (plain.load_stored(name, "U8", row=expert)[outputs] for name in names)
    if (exponents == _NOT_A_NUMBER).any():
        raise InvalidCheckpoint(f"{names[1]} has scales that are no numbers; the checkpoint is damaged")
    floats = _DOUBLED[np.stack([blocks & 15, blocks >> 4], -1).reshape(len(blocks), -1)]
    scales = np.ldexp(np.float32(0.5), exponents.astype(np.int32) - 127)
    zeros = np.full(scales.shape, _MIDDLE, np.uint8)
    return Codes((floats + _MIDDLE).astype(np.uint8), zeros, scales, groups_in_order(floats.shape[1], scales.shape[1]))
