"""Layers in fp8 with scales, as DeepSeek, AutoFP8, FBGEMM and transformers' fine-grained fp8 store them.

    fp8          weight F8  weight_scale_inv [N/128, K/128], or weight_scale for a matrix or each row
    fbgemm_fp8   weight F8  weight_scale [N, 1]

Both kinds of scale multiply. No integers are the same values, so the weights become floats.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown
from export.checkpoint.quantized.scaled_floats import FP8, read_scales, times_scales
from export.checkpoint.quantized.settings import refuse_unknown
from export.checkpoint.quantized.stored_layer import StoredLayer, StoredLayers
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from runtime.errors import InvalidCheckpoint

SCALES = ("weight_scale_inv", "weight_scale")
# Of activations and of a KV cache: neither changes the weights.
_COMPUTES = (
    "input_scale", "activation_scale", "activation_scale_inv", "input_scale_ub", "k_scale", "v_scale", "kv_scale",
)  # fmt: skip
_KNOWN = frozenset(
    {
        "quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "modules_to_not_convert",
        "ignored_layers", "ignore", "activation_scale_ub", "kv_cache_scheme", "dequantize", "scale_dtype",
    }
)  # fmt: skip


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The fp8 layers, see config.py."""
    refuse_unknown(raw, _KNOWN)
    block = block_of(raw.get("weight_block_size"), "weight_block_size")
    layers = {}
    for name, info in plain.tensors.items():
        module = name.removesuffix(".weight")
        if info.dtype in FP8 and module != name:
            layers[module] = fp8_layer(plain, module, block)
    return StoredLayers(name=f"{raw['quant_method']} weights", layers=layers, unused=ending_in(plain, _COMPUTES))


def fp8_layer(plain: SafetensorsCheckpoint, module: str, block: tuple[int, int] | None) -> StoredLayer:
    """A layer with `weight` in fp8 and one of SCALES. InvalidCheckpoint if it has no scale."""
    info = plain.tensors[f"{module}.weight"]
    scale = next((f"{module}.{part}" for part in SCALES if f"{module}.{part}" in plain.tensors), None)
    if scale is None or len(info.shape) != 2:
        what = "has no weight_scale_inv or weight_scale" if scale is None else f"has the shape {list(info.shape)}"
        raise InvalidCheckpoint(f"{module}.weight is {info.dtype} and {what}; the checkpoint is not whole fp8")

    def load() -> NDArray[np.float32]:
        weight = plain.load_stored(f"{module}.weight", *FP8).astype(np.float32)
        scales = read_scales(plain, scale)
        # Some tools declare blocks and store a scale for each row or for the matrix.
        is_blocks = block is not None and scales.size > 1 and scales.shape not in ((len(weight), 1), (len(weight),))
        return times_scales(weight, scales, module, block=block if is_blocks else None)

    n, k = info.shape
    tensors = frozenset({f"{module}.weight", scale})
    return StoredLayer(shape=(n, k), kind="fp8", tensors=tensors, weight=load)


def block_of(value: object, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block; InvalidCheckpoint for another value than two sizes."""
    if value is None:
        return None
    if not (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        raise InvalidCheckpoint(f"config.json: quantization_config.{key} must be two sizes, got {shown(value)}")
    return value[0], value[1]


def ending_in(plain: SafetensorsCheckpoint, parts: tuple[str, ...]) -> frozenset[str]:
    """The tensors whose last name is one of `parts`."""
    return frozenset(name for name in plain.tensors if name.rpartition(".")[2] in parts)
