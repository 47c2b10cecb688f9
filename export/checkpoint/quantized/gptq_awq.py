"""A checkpoint whose linear layers a GPTQ or AWQ tool has quantized: its integers, without another rounding.

`load` gives float32 weights under their usual names, and `imported` the integers. The packings, with P = 32 / bits
values to an int32, the first in its lowest bits:

    gptq   qweight [K/P, N]  along the inputs        qzeros [groups, N/P]        scales [groups, N]    g_idx [K]
    awq    qweight [K, N/P]  along the outputs, of each eight in the order 0 2 4 6 1 3 5 7; qzeros alike
    both   weight = (value - zero) * scale; gptq (v1, not v2) stores zero - 1
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.quantized.config import StoredScheme, parse_quantization
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.checkpoint.view import CheckpointView
from export.storage.quantized_rows import Codes, ImportedRows, to_blocks
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def open_directory(path: Path, *, source: str | None = None, commit: str | None = None) -> Checkpoint:
    """Open a Hugging Face directory, quantized or not. Arguments and errors are those of the two classes."""
    plain = SafetensorsCheckpoint(path, source=source, commit=commit)
    raw = plain.config.get("quantization_config")
    return plain if raw is None else QuantizedCheckpoint(plain, parse_quantization(raw))


class QuantizedCheckpoint(CheckpointView):
    """A checkpoint over one whose tensors are packed integers."""

    def __init__(self, plain: SafetensorsCheckpoint, scheme: StoredScheme) -> None:
        """InvalidCheckpoint if no layer is packed as the scheme says, or a layer lacks a part."""
        super().__init__(plain)
        self._plain, self.scheme = plain, scheme
        self._modules = {name.removesuffix(".qweight") for name in plain.tensors if name.endswith(".qweight")}
        if not self._modules:
            raise InvalidCheckpoint(
                f"config.json says {scheme.name}, and no tensor is called *.qweight; it is in another format"
            )
        packed = {f"{module}.{part}" for module in self._modules for part in _PARTS}
        virtual = {f"{module}.weight": self._info(module) for module in sorted(self._modules)}
        rest = {name: info for name, info in plain.tensors.items() if name not in packed}
        twice = next((name for name in virtual if name in rest), None)
        if twice is not None:
            raise InvalidCheckpoint(f"the checkpoint has both {twice} and its quantized form; remove one of them")
        self._tensors = MappingProxyType(rest | virtual)

    @property
    def config(self) -> Mapping[str, Any]:
        """Without quantization_config, which this class has applied."""
        return {name: value for name, value in self._plain.config.items() if name != "quantization_config"}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def stored_bits(self) -> int:
        """Bits of the quantized layers."""
        return self.scheme.bits

    def load(self, name: str) -> NDArray[np.float32]:
        module = name.removesuffix(".weight")
        return self._codes(module).dequantized() if self._is_packed(name) else self._plain.load(name)

    def imported(self, name: str) -> ImportedRows | None:
        """A weight's own integers in the layout of MatMulNBits; None for a tensor that is stored as floats."""
        if not self._is_packed(name):
            return None
        return to_blocks(self._codes(name.removesuffix(".weight")), bits=self.scheme.bits, name=name)

    def _is_packed(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self._modules

    def _info(self, module: str) -> TensorInfo:
        parts = {part: self._plain.tensors.get(f"{module}.{part}") for part in _PARTS}
        missing = [part for part in _PARTS[:3] if parts[part] is None]
        if missing:
            raise InvalidCheckpoint(
                f"{module} has no {', '.join(missing)}: the checkpoint is not whole {self.scheme.name}"
            )
        qweight, qzeros, scales = (parts[part].shape for part in _PARTS[:3])  # type: ignore[union-attr]  # none is missing
        per_word = 32 // self.scheme.bits
        if len(qweight) != 2 or len(qzeros) != 2 or len(scales) != 2:
            raise self._misfit(module, qweight, qzeros, scales)
        gptq = self.scheme.method == "gptq"
        k, n = (qweight[0] * per_word, qweight[1]) if gptq else (qweight[0], qweight[1] * per_word)
        num_groups = 1 if self.scheme.group_size is None else -(-k // self.scheme.group_size)
        if scales != (num_groups, n) or qzeros != (num_groups, -(-n // per_word)):
            raise self._misfit(module, qweight, qzeros, scales)
        return TensorInfo((n, k), f"{self.scheme.method} {self.scheme.bits} bits")

    def _misfit(self, module: str, *shapes: tuple[int, ...]) -> InvalidCheckpoint:
        told = ", ".join(f"{part} {shape}" for part, shape in zip(_PARTS, shapes, strict=False))
        return InvalidCheckpoint(f"{module}: {told} do not fit {self.scheme.name}; the checkpoint is in another format")

    def _codes(self, module: str) -> Codes:
        """Unpack one layer; takes two bytes of memory a weight."""
        qweight, qzeros = (self._plain.load_words(f"{module}.{part}") for part in ("qweight", "qzeros"))
        scales = np.ascontiguousarray(self._plain.load(f"{module}.scales").T)
        if self.scheme.method == "awq":
            values, zeros = unpack_awq(qweight).T, unpack_awq(qzeros).T
        else:
            values = unpack_words(np.ascontiguousarray(qweight.T), self.scheme.bits)
            stored = unpack_words(qzeros, self.scheme.bits)[:, : scales.shape[0]].T
            zeros = gptq_zeros(stored, self.scheme, module)
        group_of = self._group_of(module, values.shape[1])
        return Codes(np.ascontiguousarray(values), np.ascontiguousarray(zeros), scales, group_of)

    def _group_of(self, module: str, k: int) -> NDArray[np.int64]:
        name = f"{module}.g_idx"
        size = self.scheme.group_size or k
        if name not in self._plain.tensors:
            return np.arange(k) // size
        group_of = self._plain.load_words(name).astype(np.int64)
        num_groups = -(-k // size)
        # Some tools write negative numbers for groups counted from the end, as torch indexes them.
        group_of = np.where(group_of < 0, group_of + num_groups, group_of)
        if group_of.shape != (k,) or group_of.min() < 0 or group_of.max() >= num_groups:
            raise InvalidCheckpoint(f"{name} must name one of {num_groups} groups for each of {k} inputs")
        return group_of


def unpack_words(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """int32 `[..., W]` to uint8 `[..., W * 32 / bits]`, the lowest bits of a word first."""
    small = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return small
    return np.stack([small & 15, small >> 4], -1).reshape(*small.shape[:-1], -1)


def unpack_awq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32 `[R, W]` of AWQ's gemm packing to uint8 `[R, 8 * W]`."""
    mixed = unpack_words(words, 4).reshape(words.shape[0], -1, 8)
    straight = np.empty_like(mixed)
    straight[..., list(_AWQ_ORDER)] = mixed
    return straight.reshape(words.shape[0], -1)


def gptq_zeros(stored: NDArray[np.uint8], scheme: StoredScheme, module: str) -> NDArray[np.uint8]:
    """Zero points of a GPTQ layer from those stored.

    Format gptq stores zero points minus one, gptq_v2 as they are. Some tools write gptq_v2 and declare gptq. In a
    symmetric layer that does not matter, since its zero point can only be the middle. In an asymmetric layer of format
    gptq, 0 is stored as the highest value, which readers take for 0, for 2^bits, or for a carry: it is refused.
    """
    middle, top = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    if scheme.symmetric:
        if not ((stored == middle - 1).all() or (stored == middle).all()):
            raise UnsupportedModel(
                f"{module} has zero points other than {middle}, though quantization_config says sym: set sym to false "
                "if the tool that wrote it did not mean it"
            )
        return np.full_like(stored, middle)
    if scheme.checkpoint_format == "gptq_v2":
        return stored
    if (stored == top).any():
        raise UnsupportedModel(
            f"{module} has a zero point stored as {top}, which checkpoint_format gptq cannot mean without ambiguity; "
            "save the checkpoint in gptq_v2 with the tool that made it"
        )
    return np.asarray(stored + 1, np.uint8)
