"""The table of decoders this release exports: one row a family, holding only what differs.

A row says which switches a family sets and which config fields it reads; `parse_config` turns any config.json into a
`ModelConfig`, and refuses by name what the graph could not honour. Reads no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.config import ModelConfig, RopeConfig
from runtime.errors import InvalidCheckpoint, UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What sets a family apart from Llama.

    qkv_bias, o_bias, mlp_bias: True, False, or the name of the config field that decides
    sliding: "always" (every layer, if sliding_window is set), "flagged" (only with use_sliding_window, from layer
    max_window_layers on) or "never"; a `layer_types` list in the config wins over both
    fields: config fields of this family beyond the shared ones
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding: str = "never"
    fields: frozenset[str] = frozenset()


_SLIDING_FIELDS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        fields=frozenset({"attention_bias", "mlp_bias", "pretraining_tp"}),
    ),
    "mistral": Architecture(sliding="always", fields=_SLIDING_FIELDS),
    "qwen2": Architecture(qkv_bias=True, sliding="flagged", fields=_SLIDING_FIELDS),
    "qwen3": Architecture(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        sliding="flagged",
        fields=_SLIDING_FIELDS | {"attention_bias"},
    ),
}

_SHARED_FIELDS = frozenset(
    {
        "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "hidden_act",
        "bos_token_id", "eos_token_id",
    }
)  # fmt: skip

# Fields that cannot change the graph: training, generation, bookkeeping.
_IRRELEVANT_FIELDS = frozenset(
    {
        "attention_dropout", "auto_map", "dtype", "initializer_range", "is_local", "keys_to_ignore_at_inference",
        "local_files_only", "name_or_path", "pad_token_id", "torch_dtype", "transformers_version",
        "transformers.js_config",
        "unk_token_id", "use_cache", "chunk_size_feed_forward", "output_attentions", "output_hidden_states",
        "return_dict", "problem_type", "id2label", "label2id", "unsloth_version", "unsloth_fixed", "use_mrope",
        "is_llama_config", "rope_interleaved",
    }
)  # fmt: skip

_ROPE_FIELDS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        }
    ),
}  # fmt: skip


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check a config.json and reduce it to what the graph needs.

    UnsupportedModel names the model type or field that has no graph here and lists what has;
    InvalidCheckpoint names a field that is missing or makes no sense.
    """
    model_type = raw.get("model_type")
    arch = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if arch is None:
        raise UnsupportedModel(
            f"model type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    _refuse_unknown(raw, arch)
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    if raw.get("rope_interleaved"):
        raise UnsupportedModel("rope_interleaved: true is not supported; supported: false")
    hidden_size = _size(raw, "hidden_size")
    num_heads = _size(raw, "num_attention_heads")
    num_layers = _size(raw, "num_hidden_layers")
    num_kv_heads = _size(raw, "num_key_value_heads", num_heads)
    head_dim = _size(raw, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise InvalidCheckpoint(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 8:
        raise UnsupportedModel(f"head_dim {head_dim} is not supported; supported: multiples of 8")
    max_len = _size(raw, "max_position_embeddings")
    return ModelConfig(
        model_type=str(model_type),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_size(raw, "vocab_size"),
        max_position_embeddings=max_len,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_len),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=_switch(raw, arch.qkv_bias),
        o_bias=_switch(raw, arch.o_bias),
        mlp_bias=_switch(raw, arch.mlp_bias),
        qk_norm=arch.qk_norm,
        sliding_windows=_windows(raw, arch, num_layers),
        eos_ids=_token_ids(raw, "eos_token_id"),
        bos_id=next(iter(_token_ids(raw, "bos_token_id")), None),
    )


def _refuse_unknown(raw: Mapping[str, Any], arch: Architecture) -> None:
    known = _SHARED_FIELDS | _IRRELEVANT_FIELDS | arch.fields
    for name, value in raw.items():
        if name in known or name.startswith("_") or value in (None, False, [], {}, ""):
            continue
        raise UnsupportedModel(
            f"config field {name} = {value!r} is not supported for model type {raw['model_type']!r}: it may change "
            f"the computation. Fields read: {', '.join(sorted(_SHARED_FIELDS | arch.fields))}. "
            f"Remove it from config.json if it has no effect."
        )


def _rope(raw: Mapping[str, Any], max_len: int) -> RopeConfig:
    """transformers 5 keeps theta and scaling in rope_parameters, 4 in rope_theta and rope_scaling."""
    scaling: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = raw.get(field) or {}
        if not isinstance(value, dict):
            raise InvalidCheckpoint(f"config.json: {field} must be an object, got {value!r}")
        scaling.update(value)
    theta = float(scaling.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    older_kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", older_kind) or "default"
    if kind not in _ROPE_FIELDS:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    for name, value in scaling.items():
        if name not in _ROPE_FIELDS[kind] and value not in (None, False, 1.0) and kind != "default":
            raise UnsupportedModel(f"rope field {name} = {value!r} is not supported for rope type {kind!r}")
        if name == "partial_rotary_factor" and value not in (None, 1.0):
            raise UnsupportedModel(f"partial_rotary_factor {value!r} is not supported; supported: 1.0")
    factor = float(scaling.get("factor") or 1.0)
    original = int(scaling.get("original_max_position_embeddings") or max_len)
    if theta <= 0 or factor <= 0 or original <= 0:
        raise InvalidCheckpoint(
            f"config.json: rope theta {theta}, factor {factor}, original length {original} must be positive"
        )
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_len=original,
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _windows(raw: Mapping[str, Any], arch: Architecture, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if arch.sliding == "never" or window is None:
        return (None,) * num_layers
    window = _size(raw, "sliding_window")
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers or not set(layer_types) <= {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(
                f"layer_types must name full_attention or sliding_attention for each of the {num_layers} layers, "
                f"got {layer_types!r}"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if arch.sliding == "always":
        return (window,) * num_layers
    if not _flag(raw, "use_sliding_window"):
        return (None,) * num_layers
    first = _size(raw, "max_window_layers", num_layers, minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _size(raw: Mapping[str, Any], name: str, default: int | None = None, *, minimum: int = 1) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidCheckpoint(f"config.json: {name} must be an integer of at least {minimum}, got {value!r}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidCheckpoint(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise InvalidCheckpoint(f"config.json: {name} must be true or false, got {value!r}")
    return value


def _switch(raw: Mapping[str, Any], switch: bool | str) -> bool:
    return switch if isinstance(switch, bool) else _flag(raw, switch)


def _token_ids(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = raw.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise InvalidCheckpoint(f"config.json: {name} must be a token id or a list of them, got {value!r}")
    return tuple(ids)
