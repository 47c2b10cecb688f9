"""A linear layer as a quantization tool stored it, and the layers of a whole checkpoint.

A format's module finds its layers (`find_layers`); `quantized/checkpoint.py` reads them. Knows no format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.storage.quantized_rows import Codes

KNOWN_BITS = (4, 8)
"""Bits of the integers that an artifact can hold. Narrower ones are kept in the next wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One weight `[outputs, inputs]`.

    kind: the stored form, for messages
    tensors: names of the tensors that it is made of, none of which is a weight by itself
    bits: of its integers in an artifact, 4 or 8; None if no integers of an artifact are the same values
    codes: reads the integers, if there are any
    weight: reads float32 instead, if there are none
    input_scale: reads the static scale of symmetric int8 inputs, if the tool chose one
    """

    shape: tuple[int, int]
    kind: str
    tensors: frozenset[str]
    bits: int | None = None
    codes: Callable[[], Codes] | None = None
    weight: Callable[[], NDArray[np.float32]] | None = None
    input_scale: Callable[[], float] | None = None

    def load(self) -> NDArray[np.float32]:
        """float32 `[outputs, inputs]`."""
        if self.weight is not None:
            return self.weight()
        assert self.codes is not None, "a layer has integers or floats"
        return self.codes().dequantized()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayers:
    """Every quantized layer of a checkpoint, by module name.

    name: the scheme, for messages
    unused: tensors that say how the tool computes with the layers, and not what the weights are
    notes: lines for the user: how an export differs from what the tool computes
    """

    name: str
    layers: Mapping[str, StoredLayer]
    unused: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def container_bits(bits: int) -> int:
    """The bits of an artifact that hold integers of `bits` bits."""
    return next(known for known in KNOWN_BITS if bits <= known)


def in_container(codes: Codes, bits: int) -> Codes:
    """The same weights with integers of `container_bits(bits)`: the middle of the range stays the middle."""
    offset = (1 << (container_bits(bits) - 1)) - (1 << (bits - 1))
    if not offset:
        return codes
    small = np.uint8(offset)
    return codes._replace(values=codes.values + small, zeros=codes.zeros + small)


def unpack_words(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """int32 `[..., W]` to uint8 `[..., W * 32 // bits]`, the lowest bits of a word first; values may cross words."""
    small = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return small
    if bits == 4:
        return np.stack([small & 15, small >> 4], -1).reshape(*small.shape[:-1], -1)
    num_values = small.shape[-1] * 8 // bits
    found = np.empty((*small.shape[:-1], num_values), np.uint8)
    for row in np.ndindex(small.shape[:-1]):  # row by row: a byte for each bit
        single = np.unpackbits(small[row], bitorder="little")[: num_values * bits].reshape(num_values, bits)
        found[row] = np.packbits(single, axis=-1, bitorder="little")[:, 0]
    return found


def groups_in_order(num_inputs: int, num_groups: int) -> NDArray[np.int64]:
    """The group of each input, where all groups have one length."""
    return np.arange(num_inputs) // -(-num_inputs // num_groups)
