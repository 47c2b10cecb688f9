"""Tiny configurations of architectures that each break another of Llama's assumptions, and random checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from export.checkpoint.protocol import Checkpoint, TensorInfo
from export.model.checks.tensors import expected_tensors
from export.model.description import ModelConfig
from export.model.families.architectures import parse_config
from tests.support.tiny.experts import EXPERTS
from tests.support.tiny.hybrids import HYBRIDS
from tests.support.tiny.sizes import BASE as _BASE

# Caps of 2 and 3 bend scores and logits near 1; the real ones of 50 and 30 would leave them straight.
GEMMA2 = {
    **_BASE,
    "model_type": "gemma2",
    "head_dim": 16,
    "sliding_window": 24,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
PHI3 = {
    **_BASE,
    "model_type": "phi3",
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COHERE = {**_BASE, "model_type": "cohere", "logit_scale": 0.5}

# Several of GPT-2's descendants call sizes as it does.
_GPT: dict[str, Any] = {
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEO = {key: value for key, value in _BASE.items() if key not in ("num_hidden_layers", "num_attention_heads")}
del _NEO["num_key_value_heads"]

BEYOND_LLAMA: Mapping[str, dict[str, Any]] = {
    "gemma2": GEMMA2,
    "phi3": PHI3,
    "gpt2": GPT2,
    "cohere": COHERE,
    **EXPERTS,
    "arcee": {**_BASE, "model_type": "arcee", "attention_bias": True, "mlp_bias": True},
    "ernie4_5": {**_BASE, "model_type": "ernie4_5", "head_dim": 16, "use_bias": True},
    "exaone": {**_BASE, "model_type": "exaone", "num_hidden_layers": 2},
    "gemma": {**_BASE, "model_type": "gemma", "head_dim": 32},
    "glm": {**_BASE, "model_type": "glm", "head_dim": 16, "partial_rotary_factor": 0.5},
    "glm4": {**_BASE, "model_type": "glm4", "head_dim": 16, "attention_bias": True},
    "gpt_bigcode": {**_GPT, "model_type": "gpt_bigcode"},
    "gpt_neo": {
        **_NEO,
        "model_type": "gpt_neo",
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 24,
    },
    "gptj": {**_GPT, "model_type": "gptj", "rotary_dim": 8},
    "helium": {**_BASE, "model_type": "helium", "head_dim": 16, "attention_bias": True},
    "internlm3": {**_BASE, "model_type": "internlm3", "head_dim": 16, "qkv_bias": True, "bias": True},
    "iquestcoder": {**_BASE, "model_type": "iquestcoder", "head_dim": 32, "num_hidden_layers": 2},
    "jais2": {**_BASE, "model_type": "jais2"},
    "ministral": {
        **_BASE,
        "model_type": "ministral",
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "nemotron": {**_BASE, "model_type": "nemotron", "mlp_bias": True, "partial_rotary_factor": 0.5},
    "phi": {**_BASE, "model_type": "phi", "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "seed_oss": {**_BASE, "model_type": "seed_oss", "head_dim": 32, "attention_out_bias": True},
    "stablelm": {**_BASE, "model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "starcoder2": {**_BASE, "model_type": "starcoder2", "sliding_window": 24},
    **HYBRIDS,
}


def write_random(directory: Path, raw: dict[str, Any], *, seed: int = 0) -> Path:
    """Write config.json and model.safetensors with random weights that keep activations near 1, without torch."""
    config = parse_config(raw)
    checkpoint = RandomCheckpoint(config, seed)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    # Wide logits, so that two likeliest tokens are seldom close.
    tensors[config.head.linear.weight_names[0]] *= 4
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


class RandomCheckpoint(Checkpoint):
    """Random weights under the description's names, in memory; activations stay near 1."""

    source = "random"
    config: Mapping[str, Any] = {}

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._arrays = {
            name: _random(np.random.default_rng([seed, idx]), name, shape)
            for idx, (name, shape) in enumerate(expected_tensors(config).items())
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(array.shape, "F32") for name, array in self._arrays.items()}

    def load(self, name: str) -> NDArray[np.float32]:
        return self._arrays[name].copy()

    def text_files(self) -> Mapping[str, str]:
        return {}


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(shape) == 2:
        return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[1]), np.float32)
    return np.asarray(rng.standard_normal(shape) * 0.1 + name.endswith(".weight"), np.float32)
