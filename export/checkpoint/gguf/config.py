"""Makes a Hugging Face config.json from GGUF metadata.

Knows llama.cpp's metadata keys (`llama.attention.head_count`) and Hugging Face's fields, not files or the contents of
tensors. An unknown key may change what the model computes, so it is refused by name.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.config_fields import shown
from export.checkpoint.gguf.architectures import ARCHITECTURES, GgufArchitecture, row_of
from export.checkpoint.gguf.metadata import AGAIN, GgufMetadata
from runtime.errors import InvalidCheckpoint, UnsupportedModel

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Under `tokenizer.ggml.`: the end of a text, of a turn and of a message. Each ends generation."""

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")
"""Tokens that end a turn in these families' chat formats; many files do not list them as eot."""

_KNOWN_KEYS = frozenset(
    {
        "vocab_size", "block_count", "context_length", "embedding_length", "feed_forward_length", "tensor_data_layout",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scale_linear",
    }
)  # fmt: skip
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
"""Keys that no graph reads, with the values that change nothing."""

_LLAMA3_ORIGINAL_LEN = 8192
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


def model_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope: Mapping[str, NDArray[np.float32]],
    where: str,
) -> dict[str, Any]:
    """config.json of a GGUF file.

    `metadata` is every key of the file; `shapes` the tensors' by GGUF name, in numpy's order (rows first);
    `rope` the divisors of the rotary frequencies [head_dim / 2] by the name of their tensor, where there
    are some; `where` names the file in errors. Raises UnsupportedModel for an architecture or setting without a
    graph, InvalidCheckpoint for missing keys.
    """
    m = GgufMetadata(metadata, where)
    arch = architecture(metadata, where)
    row = row_of(arch, metadata)
    _refuse_unknown(metadata, arch, row, where)
    num_heads = m.size(f"{arch}.attention.head_count")
    hidden_size = m.size(f"{arch}.embedding_length")
    head_dim = _head_dim(m, arch, row, hidden_size // num_heads)
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise InvalidCheckpoint(f"{where} has no matrix token_embd.weight: not a whole language model")
    epsilon = f"{arch}.{row.epsilon[0]}"
    if epsilon not in m:
        raise InvalidCheckpoint(f"{where} has no {epsilon}; convert the model again")
    vocab_size = shapes["token_embd.weight"][0]
    eos = eos_ids(metadata, where)
    ids = {key: m.integer(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "padding")}
    for key, token_id in (("eos, eot or eom", max(eos, default=0)), ("bos", ids["bos"] or 0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidCheckpoint(
                f"{where}: {key}_token_id {token_id} is outside the vocabulary of {vocab_size:,} tokens; {AGAIN}"
            )
    config: dict[str, Any] = {
        "architectures": [row.class_name],
        "model_type": row.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": m.size(f"{arch}.feed_forward_length"),
        "num_hidden_layers": m.size(f"{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": m.size(f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": m.size(f"{arch}.context_length"),
        row.epsilon[1]: m.number(epsilon, 0.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": ids["bos"],
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": ids["padding"],
    }
    return _of_family(config, m, row, shapes, rope)


def _of_family(
    config: dict[str, Any],
    m: GgufMetadata,
    row: GgufArchitecture,
    shapes: Mapping[str, tuple[int, ...]],
    rope: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """The fields that every architecture has, completed by its own."""
    arch, head_dim = architecture(m.values, m.where), config["head_dim"]
    if row.has_rope:
        config["rope_parameters"] = _rope(m, arch, rope, head_dim)
    if row.has_partial_rope and (rotary := m.size(f"{arch}.rope.dimension_count", head_dim)) != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    for key, name in row.settings.items():
        if f"{arch}.{key}" in m:
            config[name] = m.values[f"{arch}.{key}"]
    more = {} if row.more is None else row.more(m, shapes, config)
    config |= {**row.constants, **more, **_biases(shapes, arch, m.where)}
    named = {row.renamed.get(field, field): value for field, value in config.items()}
    return {name: value for name, value in named.items() if name is not None}


def _head_dim(m: GgufMetadata, arch: str, row: GgufArchitecture, default: int) -> int:
    rotary_dim, key_length = f"{arch}.rope.dimension_count", f"{arch}.attention.key_length"
    if row.has_partial_rope:
        head_dim = m.size(key_length, max(default, 1))
        equal: tuple[str, ...] = (f"{arch}.attention.value_length",)
    else:
        head_dim = m.size(key_length, m.size(rotary_dim, max(default, 1)))
        equal = (rotary_dim, f"{arch}.attention.value_length")
    for key in equal:
        if m.size(key, head_dim) != head_dim:
            raise UnsupportedModel(
                f"{m.where}: {key} is {m.size(key, head_dim)}, and head_dim is {head_dim}; only models where they are "
                "equal are supported"
            )
    return head_dim


def architecture(metadata: Mapping[str, Any], where: str) -> str:
    """general.architecture, if it is supported; refuses adapters, projectors and pieces of split files."""
    m = GgufMetadata(metadata, where)
    arch, kind = m.text("general.architecture"), m.text("general.type") or "model"
    if kind != "model":
        raise UnsupportedModel(f"{where}: general.type is {shown(kind)}, not a model; give the model's own file")
    if (count := m.integer("split.count") or 1) > 1:
        raise UnsupportedModel(f"{where} is one of {count} pieces; join them: `llama-gguf-split --merge`")
    if arch is None or arch not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where}: general.architecture {shown(arch)} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return arch


def eos_ids(metadata: Mapping[str, Any], where: str) -> list[int]:
    """Every id that ends generation: those the file lists, then tokens known to end a turn."""
    m = GgufMetadata(metadata, where)
    listed = [m.integer(f"tokenizer.ggml.{key}") for key in EOS_KEYS]
    tokens = m.texts("tokenizer.ggml.tokens")
    named = [tokens.index(token) for token in TURN_ENDS if token in tokens]
    return list(dict.fromkeys(token_id for token_id in (*listed, *named) if token_id is not None))


def _refuse_unknown(metadata: Mapping[str, Any], arch: str, row: GgufArchitecture, where: str) -> None:
    known = _KNOWN_KEYS | row.settings.keys() | row.reads
    for key, value in metadata.items():
        field = key.removeprefix(f"{arch}.")
        if field == key or field in known:
            continue
        is_scalar = isinstance(value, bool | int | float | str)
        if not is_scalar or value not in _NEUTRAL_VALUES.get(field, ()):
            raise UnsupportedModel(
                f"{where}: {key} = {shown(value)} is not supported; a {arch} model without that setting is"
            )


def _biases(shapes: Mapping[str, tuple[int, ...]], arch: str, where: str) -> dict[str, bool]:
    """The bias switches, read off the tensors. attention_bias of llama and its like covers o_proj too."""
    if arch not in ("llama", "qwen3", "granite"):
        return {}
    has_qkv, has_o = "blk.0.attn_q.bias" in shapes, "blk.0.attn_output.bias" in shapes
    if has_qkv != has_o:
        raise UnsupportedModel(f"{where}: attn_q and attn_output must both have a bias, or neither, in a {arch} model")
    mlp = {"mlp_bias": "blk.0.ffn_gate.bias" in shapes} if arch != "qwen3" else {}
    return {"attention_bias": has_qkv} | mlp


def _rope(m: GgufMetadata, arch: str, tensors: Mapping[str, NDArray[np.float32]], head_dim: int) -> dict[str, Any]:
    """rope_parameters. Scaling comes from metadata (linear, yarn) or from tensors of divisors (llama3, longrope)."""
    prefix, where, rope_freqs = f"{arch}.rope.scaling.", m.where, tensors.get(ROPE_FREQS)
    kind = m.text(f"{prefix}type") or "none"
    factor = m.number(f"{prefix}factor", m.number(f"{arch}.rope.scale_linear", 0.0))
    theta = m.number(f"{arch}.rope.freq_base", 10000.0)
    if f"{prefix}type" not in m and factor not in (0.0, 1.0):
        kind = "linear"  # llama.cpp's own default when only a factor is given
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_LONG in tensors and ROPE_SHORT in tensors:
        return rope | {
            "rope_type": "longrope",
            "long_factor": tensors[ROPE_LONG].tolist(),
            "short_factor": tensors[ROPE_SHORT].tolist(),
            "attention_factor": m.number(f"{prefix}attn_factor", 1.0),
        }
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{where}: {prefix}type {shown(kind)} is not supported; supported: none, linear, yarn")
    if kind != "none":
        if factor <= 0:
            raise InvalidCheckpoint(f"{where}: {prefix}type is {kind} and {prefix}factor is not a positive number")
        rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if f"{prefix}original_context_length" not in m:
            raise InvalidCheckpoint(f"{where}: {prefix}type is yarn without {prefix}original_context_length")
        rope["original_max_position_embeddings"] = m.size(f"{prefix}original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if f"{prefix}yarn_{name}" in m:
                rope[name] = m.number(f"{prefix}yarn_{name}", 0.0)
    if rope_freqs is None or np.all(rope_freqs == 1):
        return rope
    if kind != "none":
        raise UnsupportedModel(f"{where}: rope_freqs.weight together with {prefix}type {kind!r} is not supported")
    if rope_freqs.shape != (head_dim // 2,) or theta < 1 or rope_freqs.min() <= 0:
        raise InvalidCheckpoint(
            f"{where}: rope_freqs.weight of shape {list(rope_freqs.shape)} and {arch}.rope.freq_base {theta:g} do "
            f"not fit the head_dim {head_dim}; {AGAIN}"
        )
    return rope | _llama3_scaling(rope_freqs, theta, where)


def _llama3_scaling(divisors: NDArray[np.float32], theta: float, where: str) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from the frequency divisors that llama.cpp stores in its place.

    The converter keeps only the result of the formula (transformers' `_compute_llama3_parameters`). The factor is the
    divisor of the lowest frequency; every Llama 3.1-3.3 has 1, 4 and 8192 for the rest. These values are checked
    against the stored divisors, so other settings are refused.
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
