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
from tests.support.tiny.dense import DENSE
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

BEYOND_LLAMA: Mapping[str, dict[str, Any]] = {
    "gemma2": GEMMA2,
    "phi3": PHI3,
    "gpt2": GPT2,
    "cohere": COHERE,
    **EXPERTS,
    **DENSE,
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
