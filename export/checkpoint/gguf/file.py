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

from export.checkpoint.gguf.config import architecture, model_config
from export.checkpoint.gguf.header import GgufTensor, read_gguf_header
from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.storage.tensor_file import read_float32
from runtime.errors import InvalidCheckpoint, UnsupportedModel

ROPE_FREQS = "rope_freqs.weight"

_GLOBAL_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
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
        rope_freqs = self._read(stored[ROPE_FREQS], ROPE_FREQS) if ROPE_FREQS in stored else None
        shapes = {name: place.shape for name, place in stored.items()}
        self._config = model_config(self._metadata, shapes, rope_freqs, file.name)
        self._is_permuted = arch == "llama"
        self._texts: Mapping[str, str] | None = None
        self._places = {_hugging_face_name(name, file): place for name, place in stored.items() if name != ROPE_FREQS}
        self._tensors = MappingProxyType(
            {
                name: TensorInfo(place.shape, gguf.GGMLQuantizationType(place.type_id).name)
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
        rotated = _ROTATED.search(name) if self._is_permuted else None
        if rotated is None:
            return values
        is_query = rotated[1] == "q"
        return unpermute(values, self._config["num_attention_heads" if is_query else "num_key_value_heads"])

    def load_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        place = self._place(name)
        if self._is_permuted and _ROTATED.search(name):
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
        if self._is_permuted and _ROTATED.search(name):
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
                "use a file with F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K tensors"
            ) from error


def _hugging_face_name(name: str, file: Path) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UnsupportedModel(
            f"{file.name}: tensor {name!r} has no place in a llama, qwen2 or qwen3 model, so this variant is "
            "not supported; give the Hugging Face checkpoint or another model"
        )
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
