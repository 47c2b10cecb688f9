"""One .gguf file as a checkpoint: tensors dequantized one at a time, under Hugging Face's names.

Knows how llama.cpp renamed and reordered the tensors. `header.py` finds them, the `gguf` library dequantizes them,
`config.py` makes the config and `tokenizer.py` the text files.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.gguf.architectures import GgufArchitecture, row_of
from export.checkpoint.gguf.config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, architecture, model_config
from export.checkpoint.gguf.header import GgufTensor, read_gguf_header
from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.storage.tensor_file import read_float32
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_WHOLE_TENSOR = re.compile(r"(\w+)\.(weight|bias)")
_ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")


class GgufCheckpoint(Checkpoint):
    """A Checkpoint over a .gguf file: metadata is read at once, a tensor when it is asked for."""

    def __init__(self, file: Path, *, source: str | None = None) -> None:
        """Open `file`; `source` is the user's name for it (default: the file's).

        InvalidCheckpoint for a truncated or corrupt file, UnsupportedModel for an architecture, setting or tensor type
        that is not supported.
        """
        import gguf

        self._file = file
        self._source = source or file.name
        self._metadata, stored = read_gguf_header(file)
        arch = architecture(self._metadata, file.name)
        _refuse_types(stored, file)
        self._row = row_of(arch, self._metadata)
        rope = {name: self._read(stored[name], name) for name in _ROPE_TENSORS if name in stored}
        shapes = {name: place.shape for name, place in stored.items()}
        self._config = model_config(self._metadata, shapes, rope, file.name)
        self._texts: Mapping[str, str] | None = None
        weights = {name: place for name, place in stored.items() if name not in _ROPE_TENSORS}
        self._places = _named(weights, self._row, file)
        self._tensors = MappingProxyType(
            {
                name: TensorInfo(self._shape(name), gguf.GGMLQuantizationType(place.type_id).name)
                for name, place in self._places.items()
            }
        )

    @property
    def source(self) -> str:
        return self._source

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def load(self, name: str) -> NDArray[np.float32]:
        values = self._read(self._place(name), name)
        if self._row.norm_offset and name.endswith("norm.weight"):
            return values - np.float32(self._row.norm_offset)
        if self._is_transposed(name):
            return np.ascontiguousarray(values.T)
        rotated = _ROTATED.search(name) if self._row.is_permuted else None
        if rotated is None:
            return values.reshape(self._shape(name))
        is_query = rotated[1] == "q"
        return unpermute(values, self._config["num_attention_heads" if is_query else "num_key_value_heads"])

    def _shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in Hugging Face's files. The gate of a shared expert is a matrix of one row there."""
        shape = self._places[name].shape
        if self._is_transposed(name):
            return shape[::-1]
        return (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight").endswith(self._row.transposed) and len(self._places[name].shape) == 2

    def _is_changed(self, name: str) -> bool:
        """Whether a tensor is not the stored one row by row."""
        is_rotated = self._row.is_permuted and _ROTATED.search(name) is not None
        is_moved = self._row.norm_offset != 0 and name.endswith("norm.weight")
        return is_rotated or is_moved or self._shape(name) != self._places[name].shape or self._is_transposed(name)

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        place = self._place(name)
        if self._is_changed(name):
            return super().load_rows(name, start, stop)
        row_bytes = place.num_bytes // place.shape[0]  # rows are whole blocks
        some = replace(
            place,
            shape=(stop - start, *place.shape[1:]),
            offset=place.offset + start * row_bytes,
            num_bytes=(stop - start) * row_bytes,
        )
        return self._read(some, name, first_row=start)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        if self._is_changed(name):
            return super().pieces(name)
        return self.row_pieces(name, self._place(name).shape[0])

    def _place(self, name: str) -> GgufTensor:
        if name not in self._places:
            raise InvalidCheckpoint(f"{self._file} has no tensor for {name!r}; it has {len(self._places)} others")
        return self._places[name]

    def text_files(self) -> Mapping[str, str]:
        from export.checkpoint.gguf.tokenizer import text_files

        if self._texts is None:
            self._texts = text_files(self._metadata, self._file.name)
        return self._texts

    def _read(self, place: GgufTensor, name: str, *, first_row: int = 0) -> NDArray[np.float32]:
        import gguf

        kind = gguf.GGMLQuantizationType(place.type_id)
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]

        def decode(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
            # As one long row: the library loops in Python over every 16 rows, and blocks are all it decodes.
            values: NDArray[np.float32] = gguf.dequantize(raw.reshape(1, -1), kind)
            return values

        return read_float32(
            self._file,
            name=name,
            offset=place.offset,
            num_bytes=place.num_bytes,
            shape=place.shape,
            block_bytes=block_bytes,
            decode=decode,
            first_row=first_row,
        )


def unpermute(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering of the rows of q_proj and k_proj, float32 [num_heads * head_dim, ...].

    Its rotary embedding for this architecture rotates neighbouring pairs (0, 1), (2, 3), ...; Hugging Face's rotates
    halves (0, head_dim / 2), ... The converter (`LlamaModel.permute` of convert_hf_to_gguf.py) swaps the rows:

        Hugging Face  a0 a1 a2 b0 b1 b2      per head; a_i and b_i are one pair
        GGUF          a0 b0 a1 b1 a2 b2
    """
    half = values.shape[0] // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _refuse_types(stored: Mapping[str, GgufTensor], file: Path) -> None:
    """Try each tensor type on a block of zeros: the library has no list of the types that it decodes."""
    import gguf

    for type_id in {place.type_id for place in stored.values()}:
        kind = gguf.GGMLQuantizationType(type_id)
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as error:
            name = next(name for name, place in stored.items() if place.type_id == type_id)
            raise UnsupportedModel(
                f"{file.name}: tensor {name} has type {kind.name}, which cannot be dequantized; "
                "use a file with F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ, TQ, MXFP4 or NVFP4 tensors"
            ) from error


def _named(stored: Mapping[str, GgufTensor], row: GgufArchitecture, file: Path) -> dict[str, GgufTensor]:
    """Tensors by Hugging Face's names; a tensor of all experts becomes one for each."""
    found: dict[str, GgufTensor] = {}
    for name, place in stored.items():
        layer, whole = _LAYER_TENSOR.fullmatch(name), _WHOLE_TENSOR.fullmatch(name)
        module = row.layer_module(layer[1], layer[2]) if layer else row.module(whole[1]) if whole else None
        if module is None:
            raise UnsupportedModel(
                f"{file.name}: tensor {name!r} has no place in a {row.model_type} model, so this variant is "
                "not supported; give the Hugging Face checkpoint or another model"
            )
        kind = name.rpartition(".")[2]
        if "{}" not in module:
            found[f"{module}.{kind}"] = place
            continue
        num_bytes = place.num_bytes // place.shape[0]
        for expert in range(place.shape[0]):
            one = replace(place, shape=place.shape[1:], offset=place.offset + expert * num_bytes, num_bytes=num_bytes)
            found[f"{module.replace('{}', str(expert))}.{kind}"] = one
    return found
