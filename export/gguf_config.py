"""Makes a Hugging Face config.json from GGUF metadata.

Knows llama.cpp's metadata keys (`llama.attention.head_count`) and Hugging Face's fields, not files or
tensors' contents. A key it does not know may change the arithmetic, so an unknown one is refused by name:
better no model than one that babbles.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InvalidCheckpoint, UnsupportedModel

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
)
"""GGUF architecture, which is Hugging Face's model_type too, to class name. GGUF calls Mistral llama."""

EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Under `tokenizer.ggml.`: the end of a text, of a turn and of a message. Each ends generation."""

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")
"""Tokens that end a turn in these families' chat formats; many files do not list them as eot."""

_KNOWN_KEYS = frozenset(
    {
        "vocab_size",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "tensor_data_layout",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scale_linear",
    }
)
_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "expert_count": (0,),
        "expert_used_count": (0,),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (1.0, -1.0),
        "rope.scaling.yarn_log_multiplier": (0.0,),
        "attention.causal": (True,),
    }
)
"""Keys that are read by no graph here, with the values that leave the model as it is."""

_LLAMA3_ORIGINAL_LEN = 8192
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


def model_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: NDArray[np.float32] | None,
    where: str,
) -> dict[str, Any]:
    """config.json of a GGUF file.

    `metadata` is every key of the file; `shapes` the tensors' by GGUF name, in numpy's order (rows first);
    `rope_freqs` the divisors of the rotary frequencies [head_dim / 2] from the tensor of that name, if there
    is one; `where` names the file in errors. Raises UnsupportedModel for an architecture or setting without a
    graph, InvalidCheckpoint for missing keys.
    """
    arch = architecture(metadata, where)
    _refuse_unknown(metadata, arch, where)
    num_heads = _integer(metadata, f"{arch}.attention.head_count", where)
    hidden_size = _integer(metadata, f"{arch}.embedding_length", where)
    rotary_dim = metadata.get(f"{arch}.rope.dimension_count")
    head_dim = int(metadata.get(f"{arch}.attention.key_length") or rotary_dim or hidden_size // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.get(f"{arch}.{key}", head_dim) != head_dim:
            raise UnsupportedModel(
                f"{where}: {arch}.{key} is {metadata[f'{arch}.{key}']}, and head_dim is {head_dim}; "
                "only models where they are equal are supported"
            )
    if "token_embd.weight" not in shapes:
        raise InvalidCheckpoint(f"{where} has no tensor token_embd.weight: not a whole language model")
    if f"{arch}.attention.layer_norm_rms_epsilon" not in metadata:
        raise InvalidCheckpoint(f"{where} has no {arch}.attention.layer_norm_rms_epsilon; convert the model again")
    eos = eos_ids(metadata)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _integer(metadata, f"{arch}.feed_forward_length", where),
        "num_hidden_layers": _integer(metadata, f"{arch}.block_count", where),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _integer(metadata, f"{arch}.attention.head_count_kv", where, default=num_heads),
        "head_dim": head_dim,
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": _integer(metadata, f"{arch}.context_length", where),
        "rms_norm_eps": float(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(metadata, arch, rope_freqs, where),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return config | _biases(shapes, arch, where)


def architecture(metadata: Mapping[str, Any], where: str) -> str:
    """general.architecture, if it is supported; refuses adapters, projectors and pieces of split files."""
    arch = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(f"{where}: general.type is {kind!r}, not a model; give the model's own file")
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModel(
            f"{where} is one of {metadata['split.count']} pieces; join them: `llama-gguf-split --merge`"
        )
    if arch not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where}: GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return str(arch)


def eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every id that ends generation: those the file lists, then tokens known to end a turn."""
    listed = [metadata.get(f"tokenizer.ggml.{key}") for key in EOS_KEYS]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    named = [tokens.index(token) for token in TURN_ENDS if token in tokens]
    return list(dict.fromkeys(int(token_id) for token_id in (*listed, *named) if token_id is not None))


def _refuse_unknown(metadata: Mapping[str, Any], arch: str, where: str) -> None:
    for key, value in metadata.items():
        field = key.removeprefix(f"{arch}.")
        if field == key or field in _KNOWN_KEYS:
            continue
        if value not in _NEUTRAL_VALUES.get(field, ()):
            raise UnsupportedModel(
                f"{where}: {key} = {value!r} is not supported; a {arch} model without that setting is"
            )


def _integer(metadata: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        raise UnsupportedModel(f"{where}: {key} differs between layers ({value}); only equal layers are supported")
    if not isinstance(value, int) or value < 1:
        raise InvalidCheckpoint(f"{where}: {key} must be a positive integer, got {value!r}; convert the model again")
    return value


def _biases(shapes: Mapping[str, tuple[int, ...]], arch: str, where: str) -> dict[str, bool]:
    """The bias switches, read off the tensors. attention_bias of llama and qwen3 covers o_proj too."""
    if arch == "qwen2":
        return {}
    has_qkv, has_o = "blk.0.attn_q.bias" in shapes, "blk.0.attn_output.bias" in shapes
    if has_qkv != has_o:
        raise UnsupportedModel(f"{where}: attn_q and attn_output must both have a bias, or neither, in a {arch} model")
    mlp = {"mlp_bias": "blk.0.ffn_gate.bias" in shapes} if arch == "llama" else {}
    return {"attention_bias": has_qkv} | mlp


def _rope(metadata: Mapping[str, Any], arch: str, rope_freqs: NDArray[np.float32] | None, where: str) -> dict[str, Any]:
    """rope_parameters. Scaling comes from metadata (linear, yarn) or from a tensor of divisors (llama3)."""
    prefix = f"{arch}.rope.scaling."
    kind = metadata.get(f"{prefix}type", "none")
    factor = float(metadata.get(f"{prefix}factor", metadata.get(f"{arch}.rope.scale_linear", 0.0)))
    theta = float(metadata.get(f"{arch}.rope.freq_base", 10000.0))
    if f"{prefix}type" not in metadata and factor not in (0.0, 1.0):
        kind = "linear"  # llama.cpp's own default when only a factor is given
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{where}: {prefix}type {kind!r} is not supported; supported: none, linear, yarn")
    if kind != "none":
        if factor <= 0:
            raise InvalidCheckpoint(f"{where}: {prefix}type is {kind} and {prefix}factor is not a positive number")
        rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = metadata.get(f"{prefix}original_context_length")
        if original is None:
            raise InvalidCheckpoint(f"{where}: {prefix}type is yarn without {prefix}original_context_length")
        rope["original_max_position_embeddings"] = int(original)
        for name in ("beta_fast", "beta_slow"):
            if f"{prefix}yarn_{name}" in metadata:
                rope[name] = float(metadata[f"{prefix}yarn_{name}"])
    if rope_freqs is None or np.all(rope_freqs == 1):
        return rope
    if kind != "none":
        raise UnsupportedModel(f"{where}: rope_freqs.weight together with {prefix}type {kind!r} is not supported")
    return rope | _llama3_scaling(rope_freqs, theta, where)


def _llama3_scaling(divisors: NDArray[np.float32], theta: float, where: str) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from the frequency divisors that llama.cpp stores in its place.

    The converter keeps only the result of the formula (transformers' `_compute_llama3_parameters`). The
    factor is the divisor of the lowest frequency; every Llama 3.1-3.3 has 1, 4 and 8192 for the rest. That
    guess is checked against the stored numbers, so other settings are refused, not misread.
    """
    factor = float(np.max(divisors))
    head_dim = 2 * divisors.size
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = (_LLAMA3_ORIGINAL_LEN / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected[wavelength < _LLAMA3_ORIGINAL_LEN / _LLAMA3_HIGH] = 1
    expected[wavelength > _LLAMA3_ORIGINAL_LEN / _LLAMA3_LOW] = factor
    # Computed and stored as float32: a few units in the last place, grown by the subtractions above.
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModel(
            f"{where}: rope_freqs.weight does not hold the divisors of Llama 3 (factor {factor:g}, length "
            f"{_LLAMA3_ORIGINAL_LEN}); give the Hugging Face checkpoint instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LEN,
    }
