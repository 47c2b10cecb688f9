"""Families that transformers does not have, and its class that computes the same from other fields and tensors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.tiny.dense import INTERNLM2, MINICPM

Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class StandIn:
    """config: of transformers' class; renamed: its tensors as the family stores them."""

    config: dict[str, Any]
    renamed: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def rewrite(self, directory: Path, config: dict[str, Any]) -> None:
        """Make the family's checkpoint of the one that transformers wrote; `config` is the family's config.json."""
        file = directory / "model.safetensors"
        save_file(self.renamed(load_file(file)), file)
        (directory / "config.json").write_text(json.dumps(config))


def _minicpm() -> StandIn:
    """MiniCPM in the fields of Granite, by the formulas of MiniCPM's own code."""
    own = ("model_type", "scale_emb", "scale_depth", "dim_model_base")
    return StandIn(
        {
            **{name: value for name, value in MINICPM.items() if name not in own},
            "model_type": "granite",
            "embedding_multiplier": MINICPM["scale_emb"],
            "residual_multiplier": MINICPM["scale_depth"] / MINICPM["num_hidden_layers"] ** 0.5,
            "logits_scaling": MINICPM["hidden_size"] / MINICPM["dim_model_base"],
            "attention_multiplier": (MINICPM["hidden_size"] // MINICPM["num_attention_heads"]) ** -0.5,
        }
    )


def _internlm2() -> StandIn:
    """InternLM2 is Llama, with queries, keys and values in one matrix, by key-value head."""
    own = ("model_type", "bias", "rope_scaling")
    config = {name: value for name, value in INTERNLM2.items() if name not in own}
    groups, dim = INTERNLM2["num_key_value_heads"], INTERNLM2["hidden_size"] // INTERNLM2["num_attention_heads"]
    renames = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }

    def renamed(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            if ".q_proj." in name:
                parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                by_head = [part.reshape(groups, -1, dim, *part.shape[1:]) for part in parts]
                fused = np.concatenate(by_head, axis=1).reshape(-1, *tensor.shape[1:])
                found[name.replace("self_attn.q_proj", "attention.wqkv")] = np.ascontiguousarray(fused)
            elif ".k_proj." not in name and ".v_proj." not in name:
                theirs = next((theirs for theirs in renames if theirs in name), "")
                found[name.replace(theirs, renames[theirs]) if theirs else name] = tensor
        return found

    return StandIn({**config, "model_type": "llama", "attention_bias": True}, renamed)


STAND_INS: Mapping[str, StandIn] = {"internlm2": _internlm2(), "minicpm": _minicpm()}
