"""Tiny configurations of dense decoders, with values that make each difference visible in the logits."""

from collections.abc import Mapping
from typing import Any

from tests.support.tiny.checkpoint import YARN
from tests.support.tiny.sizes import BASE as _BASE

MINICPM = {
    **_BASE,
    "model_type": "minicpm",
    "scale_emb": 3,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "tie_word_embeddings": False,
}

INTERNLM2 = {**_BASE, "model_type": "internlm2", "bias": True, "rope_scaling": {"type": "dynamic", "factor": 2.0}}

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
_MULTI_HEAD = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
_NEO = {key: value for key, value in _MULTI_HEAD.items() if key not in ("num_hidden_layers", "num_attention_heads")}

DENSE: Mapping[str, dict[str, Any]] = {
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
    "gemma3_text": {
        **_BASE,
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 20,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "vaultgemma": {
        **_BASE,
        "model_type": "vaultgemma",
        "head_dim": 32,
        "num_hidden_layers": 2,
        "sliding_window": 24,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "cohere2": {
        **_BASE,
        "model_type": "cohere2",
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "logit_scale": 0.5,
    },
    "gpt_neox": {
        **_MULTI_HEAD,
        "model_type": "gpt_neox",
        "rotary_pct": 0.5,
        "hidden_act": "gelu",
    },
    "falcon": {
        **{name: size for name, size in _MULTI_HEAD.items() if name != "intermediate_size"},
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 128,
        "bias": True,
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": 320,
        "hidden_size": 192,
        "n_layer": 2,
        "n_head": 6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mpt": {
        "model_type": "mpt",
        "vocab_size": 320,
        "d_model": 192,
        "n_layers": 2,
        "n_heads": 6,
        "max_seq_len": 256,
        "attn_config": {"alibi": True, "clip_qkv": 0.8, "softmax_scale": 0.3},
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 320,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "internlm2": INTERNLM2,
    "granite": {
        **_BASE,
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "hyperclovax": {
        **_BASE,
        "model_type": "hyperclovax",
        "num_hidden_layers": 2,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "minicpm": MINICPM,
    "olmo": {**_BASE, "model_type": "olmo", "clip_qkv": 0.8},
    "olmo2": {**_BASE, "model_type": "olmo2", "attention_bias": True},
    "olmo3": {
        **_BASE,
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "rope_parameters": {
            "full_attention": {**YARN, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "smollm3": {**_BASE, "model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "exaone4": {
        **_BASE,
        "model_type": "exaone4",
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "hunyuan_v1_dense": {
        **_BASE,
        "model_type": "hunyuan_v1_dense",
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1000.0},
    },
    "starcoder2": {**_BASE, "model_type": "starcoder2", "sliding_window": 24},
}
