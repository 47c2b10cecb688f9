"""Layers that a GPTQ, AWQ or AutoRound tool has packed. `gptq_settings.py` reads the configuration.

The packings, with P = 32 / bits values to an int32, the first in its lowest bits; 3 bits run on across three words:

    gptq   qweight [K/P, N]  along the inputs        qzeros [groups, N/P]        scales [groups, N]    g_idx [K]
    awq    qweight [K, N/P]  along the outputs, of each eight in the order 0 2 4 6 1 3 5 7; qzeros alike
    both   weight = (value - zero) * scale; gptq (v1, not v2) stores zero - 1
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.quantized.gptq_settings import Packing, parse_packings
from export.checkpoint.quantized.stored_layer import (
    StoredLayer,
    StoredLayers,
    container_bits,
    in_container,
    unpack_words,
)
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.storage.quantized_rows import Codes
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def find_layers(plain: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> StoredLayers:
    """The packed layers, see config.py."""
    packings = parse_packings(raw)
    modules = [name.removesuffix(".qweight") for name in plain.tensors if name.endswith(".qweight")]
    if not modules:
        raise InvalidCheckpoint(
            f"config.json says {packings.usual.name}, and no tensor is called *.qweight; it is in another format"
        )
    layers = {module: _layer(plain, module, packings.of(module)) for module in modules}
    return StoredLayers(name=packings.usual.name, layers=layers)


def _layer(plain: SafetensorsCheckpoint, module: str, packing: Packing) -> StoredLayer:
    parts = {part: plain.tensors.get(f"{module}.{part}") for part in _PARTS}
    if missing := [part for part in _PARTS[:3] if parts[part] is None]:
        raise InvalidCheckpoint(f"{module} has no {', '.join(missing)}: the checkpoint is not whole {packing.name}")
    qweight, qzeros, scales = (parts[part].shape for part in _PARTS[:3])  # type: ignore[union-attr]  # none is missing
    bits = packing.bits
    if len(qweight) != 2 or len(qzeros) != 2 or len(scales) != 2:
        raise _misfit(module, packing, qweight, qzeros, scales)
    is_awq = packing.is_awq
    k, n = (qweight[0], qweight[1] * 32 // bits) if is_awq else (qweight[0] * 32 // bits, qweight[1])
    num_groups = 1 if packing.group_size is None else -(-k // packing.group_size)
    if scales != (num_groups, n) or qzeros != (num_groups, -(-n * bits // 32)):
        raise _misfit(module, packing, qweight, qzeros, scales)
    return StoredLayer(
        shape=(n, k),
        kind=f"{packing.method} {bits} bits",
        tensors=frozenset(f"{module}.{part}" for part in _PARTS if parts[part] is not None),
        bits=container_bits(bits),
        codes=partial(_codes, plain, module, packing),
    )


def _misfit(module: str, packing: Packing, *shapes: tuple[int, ...]) -> InvalidCheckpoint:
    told = ", ".join(f"{part} {shape}" for part, shape in zip(_PARTS, shapes, strict=False))
    return InvalidCheckpoint(f"{module}: {told} do not fit {packing.name}; the checkpoint is in another format")


def _codes(plain: SafetensorsCheckpoint, module: str, packing: Packing) -> Codes:
    """Unpack one layer; takes two bytes of memory a weight."""
    qweight, qzeros = (plain.load_stored(f"{module}.{part}", "I32") for part in ("qweight", "qzeros"))
    scales = np.ascontiguousarray(plain.load(f"{module}.scales").T)
    if packing.is_awq:
        values, zeros = unpack_awq(qweight).T, unpack_awq(qzeros).T
    else:
        values = unpack_words(np.ascontiguousarray(qweight.T), packing.bits)
        stored = unpack_words(qzeros, packing.bits)[:, : scales.shape[0]].T
        zeros = gptq_zeros(stored, packing, module)
    group_of = _group_of(plain, module, packing, values.shape[1])
    codes = Codes(np.ascontiguousarray(values), np.ascontiguousarray(zeros), scales, group_of)
    return in_container(codes, packing.bits)


def _group_of(plain: SafetensorsCheckpoint, module: str, packing: Packing, k: int) -> NDArray[np.int64]:
    name = f"{module}.g_idx"
    size = packing.group_size or k
    if name not in plain.tensors:
        return np.arange(k) // size
    group_of = plain.load_stored(name, "I32").astype(np.int64)
    num_groups = -(-k // size)
    # Some tools write negative numbers for groups counted from the end, as torch indexes them.
    group_of = np.where(group_of < 0, group_of + num_groups, group_of)
    if group_of.shape != (k,) or group_of.min() < 0 or group_of.max() >= num_groups:
        raise InvalidCheckpoint(f"{name} must name one of {num_groups} groups for each of {k} inputs")
    return group_of


def unpack_awq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32 `[R, W]` of AWQ's gemm packing to uint8 `[R, 8 * W]`."""
    mixed = unpack_words(words, 4).reshape(words.shape[0], -1, 8)
    straight = np.empty_like(mixed)
    straight[..., list(_AWQ_ORDER)] = mixed
    return straight.reshape(words.shape[0], -1)


def gptq_zeros(stored: NDArray[np.uint8], packing: Packing, module: str) -> NDArray[np.uint8]:
    """Zero points of a GPTQ layer from those stored.

    Format gptq stores zero points minus one, gptq_v2 as they are. Some tools write gptq_v2 and declare gptq. In a
    symmetric layer that does not matter, since its zero point can only be the middle. In an asymmetric layer of format
    gptq, 0 is stored as the highest value, which readers take for 0, for 2^bits, or for a carry: it is refused.
    """
    middle, top = 1 << (packing.bits - 1), (1 << packing.bits) - 1
    if packing.symmetric:
        if not ((stored == middle - 1).all() or (stored == middle).all()):
            raise UnsupportedModel(
                f"{module} has zero points other than {middle}, though quantization_config says sym: set sym to false "
                "if the tool that wrote it did not mean it"
            )
        return np.full_like(stored, middle)
    if packing.checkpoint_format == "gptq_v2":
        return stored
    if (stored == top).any():
        raise UnsupportedModel(
            f"{module} has a zero point stored as {top}, which checkpoint_format gptq cannot mean without ambiguity; "
            "save the checkpoint in gptq_v2 with the tool that made it"
        )
    return np.asarray(stored + 1, np.uint8)
