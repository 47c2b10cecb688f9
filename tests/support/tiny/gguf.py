"""Writes tiny random GGUF files, the way llama.cpp's converter does, for the tests of the GGUF reader."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
TOKENS = ("<unk>", "<s>", "</s>", "a", "b", "ab")
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def permute(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The converter's reordering of q and k for llama: pair i of a head goes to its rows 2i and 2i + 1."""
    head_dim = len(rows) // num_heads
    source = []
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            source += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return rows[source]


def hugging_face_tensors(
    *, arch: str = "llama", tied: bool = True, biases: tuple[str, ...] = ()
) -> dict[str, NDArray[np.float32]]:
    """Random weights under Hugging Face's names, as they should come back. `biases` are GGUF layer names."""
    rng = np.random.default_rng(7)
    rows = {
        "attn_q": (NUM_HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, NUM_HEADS * HEAD_DIM),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
    }
    if arch == "qwen3":
        rows |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(NUM_LAYERS):
        for name, shape in rows.items():
            shapes[f"model.layers.{layer}.{NAMES[name]}.weight"] = shape
            if name in biases:
                shapes[f"model.layers.{layer}.{NAMES[name]}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """A tensor's GGUF name from its Hugging Face name."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    back = {theirs: ours for ours, theirs in NAMES.items()}
    return f"blk.{layer}.{back[module]}.{kind}"


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with (`bytes_to_unicode` of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelling[byte] for byte in range(256)]


def byte_level_metadata(pre: str | None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: 256 bytes, "ab" and its merge, and three special tokens."""
    tokens = [*byte_alphabet(), "ab", "<bos>", "<eos>", "<think>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3, 4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
    }
    return {key: value for key, value in (metadata | dict(extra or {})).items() if value is not None}


def sentencepiece_metadata(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A SentencePiece vocabulary: 256 bytes, then pieces with scores as training gives them, by rank."""
    pieces = ["▁a", "an", "▁an", "na", "ban", "▁ban", "ana", "▁", "a", "n", "b"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {key: value for key, value in (metadata | dict(extra or {})).items() if value is not None}


@dataclass
class TinyGguf:
    """What to write; `extra` overrides or adds metadata, a value of None leaves a key out."""

    arch: str = "llama"
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=hugging_face_tensors)
    extra: Mapping[str, Any] = field(default_factory=dict)
    raw_tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """More tensors, by GGUF name, as they are."""
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32

    def metadata(self) -> dict[str, Any]:
        arch = self.arch
        values = {
            f"{arch}.block_count": NUM_LAYERS,
            f"{arch}.context_length": 256,
            f"{arch}.embedding_length": HIDDEN,
            f"{arch}.feed_forward_length": INTERMEDIATE,
            f"{arch}.attention.head_count": NUM_HEADS,
            f"{arch}.attention.head_count_kv": NUM_KV_HEADS,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{arch}.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": list(TOKENS),
            "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        return {key: value for key, value in (values | dict(self.extra)).items() if value is not None}

    def write(self, file: Path) -> Path:
        """Write the file; matrices are quantized to `kind`, vectors stay float32."""
        writer = gguf.GGUFWriter(file, self.arch)
        for key, value in self.metadata().items():
            add_value(writer, key, value)
        for name, values in self.tensors.items():
            stored = values
            if self.arch == "llama" and ".q_proj." in name:
                stored = permute(values, NUM_HEADS)
            elif self.arch == "llama" and ".k_proj." in name:
                stored = permute(values, NUM_KV_HEADS)
            kind = self.kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
        for name, values in self.raw_tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
