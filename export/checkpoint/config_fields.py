"""Sorts the fields of config.json: read, without effect on the computation, or unknown.

An unknown field may change what the model computes, so it is refused with its value. `architectures.py` reads the
fields; this table only says which are allowed.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from runtime.errors import UnsupportedModel

READ_FIELDS = frozenset(
    {
        "model_type", "architectures", "auto_map", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "hidden_act",
        "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
        "bos_token_id", "eos_token_id",
    }
)  # fmt: skip
"""Fields that every family has."""

_BOOKKEEPING = frozenset(
    {
        "transformers_version", "torch_dtype", "dtype", "name_or_path", "tokenizer_class", "processor_class",
        "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side", "padding_side", "finetuning_task",
        "task_specific_params", "id2label", "label2id", "num_labels", "problem_type", "is_decoder", "torchscript",
        "use_bfloat16", "tf_legacy_loss", "keys_to_ignore_at_inference", "is_local", "local_files_only",
        "transformers.js_config", "unsloth_version", "unsloth_fixed", "unsloth_finetuned", "is_llama_config",
        "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id",
    }
)  # fmt: skip

_TRAINING = frozenset(
    {
        "initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "use_gradient_checkpointing",
        "neftune_noise_alpha", "max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "pretraining_tp",
        "label_smoothing", "output_router_logits", "router_aux_loss_coef",
    }
)  # fmt: skip

_HOW_IT_RUNS = frozenset(
    {
        "use_cache", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict",
        "attn_implementation", "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "flash_attention",
        "use_sdpa", "use_memory_efficient_attention", "low_cpu_mem_usage", "device_map", "trust_remote_code",
    }
)  # fmt: skip

_GENERATION = frozenset(
    {
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
        "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "force_words_ids",
        "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "return_dict_in_generate",
        "output_scores", "output_logits", "penalty_alpha", "renormalize_logits", "guidance_scale", "prefix",
        "stop_strings", "sequence_bias", "max_time", "max_matching_ngram_size", "prompt_lookup_num_tokens",
        "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "cache_implementation", "generation_config",
    }
)  # fmt: skip
"""Defaults of sampling, which older checkpoints keep in config.json. They change no logit."""

NO_EFFECT = _BOOKKEEPING | _TRAINING | _HOW_IT_RUNS | _GENERATION

NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("is_causal", "use_rope", "use_rms_norm"), (True,)),
        **dict.fromkeys(("is_encoder_decoder", "rope_interleaved"), (False,)),
        **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_scaling_factor"), (1,)),
        **dict.fromkeys(("logit_scale", "logits_scaling", "residual_multiplier", "embedding_multiplier"), (1,)),
        **dict.fromkeys(("num_nextn_predict_layers", "num_local_experts", "num_experts", "n_routed_experts"), (0,)),
        "hidden_activation": ("silu", "swish"),
    }
)
"""Fields that no graph reads, with the values that change nothing."""

# A switch that is false changes nothing, except these, which are true by default.
_ON_BY_DEFAULT = frozenset({"is_causal", "use_rope", "use_rms_norm", "scale_attn_weights"})

_LONGEST_VALUE = 120


def refuse_unknown(raw: Mapping[str, Any], family: Mapping[str, tuple[object, ...]]) -> None:
    """UnsupportedModel for the first field that is neither read nor known to have no effect.

    family: further fields of the family, with the values that are allowed; no values means any
    """
    for name, value in raw.items():
        if name in READ_FIELDS or name in NO_EFFECT or name.startswith("_") or "dropout" in name or "pdrop" in name:
            continue
        if value is None or value in ("", [], {}):
            continue
        if value is False and name not in _ON_BY_DEFAULT:
            continue
        allowed = family.get(name, NEUTRAL_VALUES.get(name))
        if allowed == () or _is_among(value, allowed or ()):
            continue
        known = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
        raise UnsupportedModel(
            f"config.json: {name} = {shown(value)} is not supported for model_type {raw.get('model_type')!r}, as it "
            f"may change what the model computes{known}; remove the field if it has no effect"
        )


def shown(value: object) -> str:
    """A value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def shown_names(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_among(value: object, allowed: tuple[object, ...]) -> bool:
    """True is not 1 here."""
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in allowed)
