"""Fused tensors under the names of the layers that they hold.

An architecture declares its fused tensors as a tuple of `Split`:

    phi3 = (
        Split("self_attn.qkv_proj", (("self_attn.q_proj", 3072), ("self_attn.k_proj", 1024), ...)),
        Split("mlp.gate_up_proj", (("mlp.gate_proj", None), ("mlp.up_proj", None))),
    )
    gpt2 = (
        Split("attn.c_attn", tuple((f"self_attn.{part}_proj", None) for part in "qkv"), transposed=True),
        Split("attn.c_proj", (("self_attn.o_proj", None),), transposed=True),
    )
    stacked = (Split("experts.down_proj", (("experts.{}.down_proj", None),), experts=True),)

    view = FusedView(checkpoint, phi3)
    view.load("model.layers.0.self_attn.k_proj.weight")  # reads rows 3072 to 4096 of qkv_proj from the disk
    view = FusedView(checkpoint, gpt2, renames={"transformer.h": "model.layers", "ln_1": "input_layernorm"})
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.checkpoint.safetensors_dir import STORED_TYPES
from export.checkpoint.view import CheckpointView
from export.storage.quantized_rows import ImportedRows
from runtime.errors import InvalidCheckpoint, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Split:
    """The layers in one fused tensor; the rule covers its weight and its bias.

    fused: end of the tensor's name, without `.weight` or `.bias`
    parts: what takes the place of `fused` in the name, and the number of outputs; None is an equal share of the outputs
        that the others leave. A single part renames.
    transposed: safetensors hold the weight as `[inputs, outputs]`, as GPT-2's Conv1D does
    experts: the weight is `[experts, outputs, inputs]` and may lack `.weight`, the bias may end in `_bias`; `{}` in a
        part is the expert's number
    interleaved: the parts' outputs take turns
    groups: the outputs are so many groups, each of which has all parts in turn; sizes are those in a group
    """

    fused: str
    parts: tuple[tuple[str, int | None], ...]
    transposed: bool = False
    experts: bool = False
    interleaved: bool = False
    groups: int = 1


class _Slice(NamedTuple):
    """A layer's place: some outputs of each group of a stored tensor, or of one expert in it."""

    outputs: slice
    is_transposed: bool
    expert: int | None
    num_groups: int


class FusedView(CheckpointView):
    """A checkpoint whose fused tensors are split. Tensors that fit no rule stay, so the layers may be split already."""

    def __init__(self, base: Checkpoint, splits: Sequence[Split], *, renames: Mapping[str, str] | None = None) -> None:
        """Find the layers; reads no weights.

        renames: what to replace in names, between dots and in this order, before the splits are looked for
        InvalidCheckpoint, naming the stored tensor, if one does not have the outputs of its parts, or if two hold the
        same layer. UnsupportedModel if packed integers would have to be transposed.
        """
        super().__init__(base)
        self._splits, self._renames = tuple(splits), dict(renames or {})
        self._slices: dict[str, _Slice] = {}
        self._names: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for stored, info in base.tensors.items():
            for name, shape in self._layers_in(stored, info):
                if name in tensors:
                    both = f"{self.stored_name(name)} and {base.stored_name(stored)}"
                    raise InvalidCheckpoint(f"{both} both hold {name}; remove one of them")
                tensors[name], self._names[name] = TensorInfo(shape, info.dtype), stored
        self._tensors = MappingProxyType(tensors)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> NDArray[np.float32]:
        if name in self._slices:
            return self.load_rows(name, 0, self._tensors[name].shape[0])
        return self._base.load(self._known(name))

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        return super().pieces(name) if name in self._slices else self._base.pieces(self._known(name))

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        stored, place = self._known(name), self._slices.get(name)
        if place is None:
            return self._base.load_rows(stored, start, stop)
        outputs = place.outputs
        if place.expert is not None:
            whole = self._base.load_rows(stored, place.expert, place.expert + 1)[0]
        elif place.is_transposed or place.num_groups > 1:
            whole = self._base.load(stored)
        else:
            return self._base.load_rows(stored, outputs.start + start, min(outputs.start + stop, outputs.stop))
        whole = whole.T if place.is_transposed else whole
        rest = whole.shape[1:]
        chosen = whole.reshape(place.num_groups, -1, *rest)[:, outputs].reshape(-1, *rest)
        return np.ascontiguousarray(chosen[start:stop])

    def imported(self, name: str) -> ImportedRows | None:
        stored, place = self._known(name), self._slices.get(name)
        if place is not None and (place.expert is not None or place.num_groups > 1):
            return None
        whole = self._base.imported(stored)
        return whole if whole is None or place is None else whole.between(place.outputs.start, place.outputs.stop)

    def file_of(self, name: str) -> str | None:
        return self._base.file_of(self._names.get(name, name))

    def stored_name(self, name: str) -> str:
        """The name in the files; of a tensor that is missing, the name that it would have there."""
        if name in self._names:
            return self._base.stored_name(self._names[name])
        for split in self._splits:
            for part, _ in split.parts:
                found = _ending_in(re.escape(part).replace(r"\{\}", r"\d+")).fullmatch(name)
                name = f"{found[1] or ''}{split.fused}{found[2]}" if found else name
        for stored, ours in reversed(self._renames.items()):
            name = _replaced(name, ours, stored)
        return self._base.stored_name(name)

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise InvalidCheckpoint(f"the checkpoint has no tensor {self.stored_name(name)!r}")
        return self._names[name]

    def _layers_in(self, stored: str, info: TensorInfo) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the layers in one tensor of the base."""
        name = stored
        for old, new in self._renames.items():
            name = _replaced(name, old, new)
        for split in self._splits:
            found = _ending_in(re.escape(split.fused)).fullmatch(name)
            if found and (found[2] or split.experts):
                suffix = ".bias" if found[2] == "_bias" else found[2] or ".weight"
                yield from self._parts(split, found[1] or "", suffix, stored, info)
                return
        yield name, info.shape

    def _parts(
        self, split: Split, before: str, suffix: str, stored: str, info: TensorInfo
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        shape = info.shape
        one = shape[1:] if split.experts else shape
        num_dims = 1 if suffix == ".bias" else 2
        if len(one) != num_dims:
            raise InvalidCheckpoint(
                f"{self._base.stored_name(stored)} has the shape {list(shape)}; this architecture means one of "
                f"{num_dims + split.experts} dimensions"
            )
        is_transposed = split.transposed and num_dims == 2
        if is_transposed and self._base.stored_bits is not None and info.dtype not in STORED_TYPES:
            raise UnsupportedModel(
                "packed integers of this architecture's transposed layers are not supported; give the checkpoint that "
                "is not quantized"
            )
        one = one[::-1] if is_transposed else one
        for expert in range(shape[0]) if split.experts else (None,):
            start = 0
            groups = max(1, one[0] // len(split.parts)) if split.interleaved else split.groups
            for (part, _), size in zip(split.parts, self._sizes(split, one[0], groups, stored), strict=True):
                name = f"{before}{part.replace('{}', str(expert))}{suffix}"
                self._slices[name] = _Slice(slice(start, start + size), is_transposed, expert, groups)
                start += size
                yield name, (size * groups, *one[1:])

    def _sizes(self, split: Split, num_outputs: int, num_groups: int, stored: str) -> list[int]:
        """The outputs of each part, in each of equal groups."""
        left = num_outputs // num_groups - sum(size or 0 for _, size in split.parts)
        num_equal = sum(size is None for _, size in split.parts)
        if num_outputs % num_groups or left < 0 or (left % num_equal if num_equal else left):
            wanted = ", ".join(f"{part} {'an equal share' if size is None else size}" for part, size in split.parts)
            in_each = f" in each of {num_groups} groups" if num_groups > 1 else ""
            raise InvalidCheckpoint(
                f"{self._base.stored_name(stored)} has {num_outputs} outputs, and config.json means {wanted}{in_each}"
            )
        return [left // num_equal if size is None else size for _, size in split.parts]


def _ending_in(pattern: str) -> re.Pattern[str]:
    """Matches a tensor's name that ends in the pattern. Groups: the beginning, and the suffix."""
    return re.compile(rf"(.*\.)?{pattern}(\.weight|\.bias|_bias|)")


def _replaced(name: str, old: str, new: str) -> str:
    """The name with the first `old` between dots replaced."""
    return re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name, count=1)
