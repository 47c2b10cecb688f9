"""Tiny configurations of families whose slots hold states beside K and V."""

from collections.abc import Mapping
from typing import Any

from tests.support.tiny.sizes import BASE

LFM2 = {
    **BASE,
    "model_type": "lfm2",
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "intermediate_size": 240,  # 160 after the adjustment, rounded up to 192
    "block_multiple_of": 64,
    "conv_bias": True,
}
QWEN3_5 = {
    **BASE,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    # A head's output is near 0 where q and k happen to be orthogonal, and its norm then magnifies the rounding.
    "rms_norm_eps": 1e-3,
}

LFM2_MOE = {
    **BASE,
    "model_type": "lfm2_moe",
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
}
_MIXTURE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}
QWEN3_5_MOE = {**QWEN3_5, **_MIXTURE, "model_type": "qwen3_5_moe_text"}
QWEN3_NEXT = {
    **QWEN3_5,
    **_MIXTURE,
    "model_type": "qwen3_next",
    "mlp_only_layers": [1],
}

BAMBA = {
    **BASE,
    "model_type": "bamba",
    "num_hidden_layers": 4,
    "attn_layer_indices": [1],
    "intermediate_size": 128,
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
    "time_step_limit": [0.1, 1.0],
}

FALCON_H1 = {
    **BASE,
    "model_type": "falcon_h1",
    "mamba_d_ssm": 192,
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "mamba_d_head": 48,
    "mamba_chunk_size": 16,
    "mamba_rms_norm": False,
    "attention_bias": True,
    "mlp_bias": True,
    "mamba_proj_bias": True,
    "projectors_bias": True,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.9,
    "mlp_multipliers": [0.6, 1.3],
    "ssm_multipliers": [0.5, 0.7, 1.4, 1.2, 0.8],
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.75,
}

GRANITE = {
    **BASE,
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "shared_intermediate_size": 128,
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
GRANITE_MOE = {
    **GRANITE,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "intermediate_size": 64,
    "position_embedding_type": "rope",
}

HYBRIDS: Mapping[str, dict[str, Any]] = {
    "bamba": BAMBA,
    "falcon_h1": FALCON_H1,
    "granitemoehybrid": GRANITE,
    "granitemoehybrid_moe": GRANITE_MOE,
    "lfm2": LFM2,
    "lfm2_moe": LFM2_MOE,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_next": QWEN3_NEXT,
}
