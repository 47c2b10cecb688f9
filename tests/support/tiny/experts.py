"""Tiny configurations of families with experts."""

from collections.abc import Mapping
from typing import Any

from tests.support.tiny.sizes import BASE

MIXTRAL = {
    **BASE,
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
}
QWEN2_MOE = {
    **BASE,
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
    "mlp_only_layers": [1],
    "use_sliding_window": False,
}
QWEN3_MOE = {
    **BASE,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "use_sliding_window": True,
    "sliding_window": 24,
}
# With the real jitter of 0.01 nearly every token has one expert near the best.
PHIMOE = {
    **BASE,
    "model_type": "phimoe",
    "num_local_experts": 4,
    "router_jitter_noise": 0.1,
    "attention_bias": True,
    "lm_head_bias": True,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        "short_mscale": 1.1,
        "long_mscale": 1.2,
        "original_max_position_embeddings": 256,
    },
}
ERNIE4_5_MOE = {
    **BASE,
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 6,
    "moe_k": 3,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 2,
    "use_bias": False,
    "tie_word_embeddings": True,
}
GLM4_MOE = {
    **BASE,
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}

# Some activations of random weights are beyond 1, and none beyond the real limit of 7.
GPT_OSS = {
    **BASE,
    "model_type": "gpt_oss",
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 24,
    "swiglu_limit": 1.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}

DEEPSEEK_V2 = {
    **BASE,
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK_V3 = {
    **BASE,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 64,
    },
}

GRANITEMOE = {
    **BASE,
    "model_type": "granitemoe",
    "intermediate_size": 64,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
GRANITEMOESHARED = {**GRANITEMOE, "model_type": "granitemoeshared", "shared_intermediate_size": 128}
OLMOE = {
    **BASE,
    "model_type": "olmoe",
    "intermediate_size": 64,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "attention_bias": True,
}
HUNYUAN_V1_MOE = {
    **BASE,
    "model_type": "hunyuan_v1_moe",
    "head_dim": 16,
    "num_experts": 4,
    "moe_topk": 2,
    "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0},
}
_EVERY = (
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, PHIMOE, ERNIE4_5_MOE, GLM4_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3,
    GRANITEMOE, GRANITEMOESHARED, OLMOE,
    HUNYUAN_V1_MOE
)  # fmt: skip
EXPERTS: Mapping[str, dict[str, Any]] = {str(raw["model_type"]): raw for raw in _EVERY}
