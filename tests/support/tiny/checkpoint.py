"""Tiny random checkpoints in Hugging Face's layout, written with numpy: one for every branch of the graph."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-mqa-wide-heads": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 32},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-llama3": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-yarn": {"model_type": "qwen2", "rope_scaling": YARN, "tie_word_embeddings": True},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
}


def config_of(variant: str, **changes: Any) -> dict[str, Any]:
    """config.json of a variant, with changes."""
    return {**BASE, **VARIANTS[variant], **changes}


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write config.json and model.safetensors with random weights that keep activations near 1.

    shapes: of all tensors, if the family is none of `shapes_of`
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if len(shape) > 1
        else (rng.standard_normal(shape) * 0.1 + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in (shapes or shapes_of(config)).items()
    }
    # Wide logits, so that two likeliest tokens are seldom close.
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    tensors[head] *= 4
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape, from the families' definitions."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    family = config["model_type"]
    has_attention_bias = family == "qwen2" or bool(config.get("attention_bias"))
    has_o_bias = family != "qwen2" and has_attention_bias
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        matrices = {
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            is_o, is_attention = name.endswith("o_proj"), name.startswith("self_attn")
            if (has_o_bias if is_o else has_attention_bias) if is_attention else config.get("mlp_bias"):
                shapes[f"{prefix}.{name}.bias"] = (shape[0],)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        if family == "qwen3":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
    return shapes
