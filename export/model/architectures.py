"""The table of decoders this release exports: one row a family, holding only what differs.

A row says which switches a family sets, its defaults and the config fields it reads; `parse_config` turns any
config.json into a `ModelConfig`, and refuses by name what the graph could not honour. Reads no files.

A field that is missing has transformers' default of the family, because tools leave out what equals it; the tests
compare every default with `AutoConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from export.checkpoint.config_fields import refuse_unknown, shown
from export.model.config import ModelConfig
from export.model.config_values import flag, integer, number, token_ids
from export.model.rope_fields import rope_config
from runtime.errors import InvalidCheckpoint, UnsupportedModel

MAX_LAYERS = 1024
"""The largest published decoder has 126."""

_ANY: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """transformers' values for fields that a config.json leaves out.

    num_kv_heads, head_dim: None is as many as heads, and hidden_size / num_attention_heads
    window: of sliding_window
    """

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    window: int | None = None
    max_window_layers: int = 28
    bos_id: int | None = 1
    eos_id: int | None = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What sets a family apart from Llama.

    class_name: transformers' class for it
    qkv_bias, o_bias, mlp_bias: True, False, or the name of the config field that decides
    sliding: "always" (every layer, if sliding_window is set), "flagged" (only with use_sliding_window, from layer
        max_window_layers on) or "never"; a `layer_types` list in the config wins where there is a window
    fields: config fields of this family beyond the shared ones, with the values that they may have; () is any
    """

    class_name: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding: str = "never"
    defaults: Defaults = field(default_factory=Defaults)
    fields: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


_QWEN = Defaults(
    vocab_size=151_936,
    intermediate_size=22_016,
    num_kv_heads=32,
    max_position_embeddings=32_768,
    window=4096,
    bos_id=None,
    eos_id=None,
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            class_name="LlamaForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            fields={"attention_bias": _ANY, "mlp_bias": _ANY},
        ),
        "mistral": Architecture(
            class_name="MistralForCausalLM",
            sliding="always",
            defaults=Defaults(intermediate_size=14_336, num_kv_heads=8, max_position_embeddings=131_072, window=4096),
        ),
        "qwen2": Architecture(
            class_name="Qwen2ForCausalLM",
            qkv_bias=True,
            sliding="flagged",
            defaults=_QWEN,
            fields={"attention_bias": (True, False), "qkv_bias": (True,), "use_mrope": (False,)},
        ),
        "qwen3": Architecture(
            class_name="Qwen3ForCausalLM",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            sliding="flagged",
            defaults=replace(_QWEN, head_dim=128),
            fields={"attention_bias": _ANY, "use_qk_norm": (True,), "qk_norm": (True,)},
        ),
    }
)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check a config.json and reduce it to what the graph needs.

    UnsupportedModel names the model type or field that has no graph here and lists what has;
    InvalidCheckpoint names a field that makes no sense.
    """
    arch = _architecture(raw)
    refuse_unknown(raw, arch.fields)
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel(f"config.json: hidden_act {shown(activation)} is not supported; supported: silu")
    defaults = arch.defaults
    num_layers = integer(raw, "num_hidden_layers", defaults.num_layers, maximum=MAX_LAYERS)
    vocab_size = integer(raw, "vocab_size", defaults.vocab_size)
    max_len = integer(raw, "max_position_embeddings", defaults.max_position_embeddings)
    heads = _heads(raw, defaults)
    return ModelConfig(
        model_type=str(raw["model_type"]),
        hidden_size=heads.hidden_size,
        intermediate_size=integer(raw, "intermediate_size", defaults.intermediate_size),
        num_layers=num_layers,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_len,
        rms_norm_eps=number(raw, "rms_norm_eps", defaults.rms_norm_eps),
        rope=rope_config(raw, max_len),
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        qkv_bias=_switch(raw, arch.qkv_bias),
        o_bias=_switch(raw, arch.o_bias),
        mlp_bias=_switch(raw, arch.mlp_bias),
        qk_norm=arch.qk_norm,
        sliding_windows=_windows(raw, arch, num_layers),
        eos_ids=_ids(raw, "eos_token_id", defaults.eos_id, vocab_size),
        bos_id=next(iter(_ids(raw, "bos_token_id", defaults.bos_id, vocab_size)), None),
    )


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    """The row of model_type, if `architectures` and `auto_map` do not name a class that computes something else."""
    model_type = raw.get("model_type")
    arch = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if arch is None:
        found = f"model_type {shown(model_type)} is not supported" if "model_type" in raw else "there is no model_type"
        raise UnsupportedModel(f"config.json: {found}; supported: {', '.join(sorted(ARCHITECTURES))}")
    # A class of another family is a slip of a tool: transformers goes by model_type, and so do we.
    known = {row.class_name.lower() for row in ARCHITECTURES.values()}
    classes = raw.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InvalidCheckpoint(f"config.json: architectures must be a list of class names, got {shown(classes)}")
    if classes and not any(name.lower() in known for name in classes):
        raise UnsupportedModel(
            f"config.json: architectures {shown(classes)} is not supported for model_type {model_type!r}; supported: "
            f"{arch.class_name}, a causal language model"
        )
    remote = raw.get("auto_map") or {}
    code = remote.get("AutoModelForCausalLM") if isinstance(remote, dict) else remote
    if code is not None and (not isinstance(code, str) or code.rpartition(".")[2].lower() not in known):
        raise UnsupportedModel(
            f"config.json: auto_map names code of the model's own ({shown(code)}), which is never run; supported: "
            f"{arch.class_name}"
        )
    return arch


class _Heads(NamedTuple):
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _heads(raw: Mapping[str, Any], defaults: Defaults) -> _Heads:
    """Sizes of attention that must fit each other."""
    hidden_size = integer(raw, "hidden_size", defaults.hidden_size)
    num_heads = integer(raw, "num_attention_heads", defaults.num_heads)
    # transformers takes null as one key-value head a head, and a missing field as the family's number.
    kv_default = num_heads if raw.get("num_key_value_heads", 0) is None else defaults.num_kv_heads or num_heads
    num_kv_heads = integer(_without_null(raw, "num_key_value_heads"), "num_key_value_heads", kv_default)
    if num_heads % num_kv_heads:
        source = (
            "" if raw.get("num_key_value_heads") is not None else " (the family's default, as config.json has none)"
        )
        raise InvalidCheckpoint(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            f"{source}"
        )
    values = raw if defaults.head_dim is not None else _without_null(raw, "head_dim")
    if "head_dim" not in values and defaults.head_dim is None and hidden_size % num_heads:
        raise InvalidCheckpoint(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there "
            "is no head_dim"
        )
    head_dim = integer(values, "head_dim", defaults.head_dim or hidden_size // num_heads)
    if head_dim % 8:
        raise UnsupportedModel(f"config.json: head_dim {head_dim} is not supported; supported: multiples of 8")
    return _Heads(hidden_size, num_heads, num_kv_heads, head_dim)


def _windows(raw: Mapping[str, Any], arch: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, None where it attends to everything."""
    layer_types = raw.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if layer_types is not None and not (
        isinstance(layer_types, list)
        and len(layer_types) == num_layers
        and all(isinstance(kind, str) and kind in kinds for kind in layer_types)
    ):
        raise UnsupportedModel(
            f"config.json: layer_types must name {' or '.join(kinds)} for each of the {num_layers} layers, got "
            f"{shown(layer_types)}"
        )
    is_on = flag(raw, "use_sliding_window", default=arch.sliding == "always")
    window = _window(raw, arch, is_on=is_on)
    if layer_types is not None:
        if window is None and "sliding_attention" in layer_types:
            raise InvalidCheckpoint(
                "config.json: layer_types has sliding_attention, and no window is switched on: sliding_window is "
                f"{shown(raw.get('sliding_window'))}, use_sliding_window {shown(raw.get('use_sliding_window'))}"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if arch.sliding != "flagged":
        return (window,) * num_layers
    first = integer(raw, "max_window_layers", arch.defaults.max_window_layers, minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _window(raw: Mapping[str, Any], arch: Architecture, *, is_on: bool) -> int | None:
    """The window of the layers that have one; None if it is switched off. Refuses one that the family would not honour.

    Llama has no window, Mistral no switch: where a config of theirs has one all the same, transformers ignores it, and
    others do not.
    """
    if raw.get("sliding_window", arch.defaults.window) is None:
        return None
    window = integer(raw, "sliding_window", arch.defaults.window or 0)
    if arch.sliding == "flagged":
        return window if is_on else None
    if arch.sliding == "always" and not is_on:
        raise UnsupportedModel(
            f"config.json: use_sliding_window is false and sliding_window is {window}, which {raw['model_type']} would "
            "use all the same; set sliding_window to null if there is none"
        )
    if arch.sliding == "never" and raw.get("use_sliding_window") is not False:
        raise UnsupportedModel(
            f"config.json: sliding_window = {window} is not supported for model_type {raw['model_type']!r}; supported: "
            "null"
        )
    return window if is_on else None


def _switch(raw: Mapping[str, Any], switch: bool | str) -> bool:
    return switch if isinstance(switch, bool) else flag(raw, switch)


def _ids(raw: Mapping[str, Any], name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
    if name not in raw:  # the family's default need not be in a small vocabulary
        return () if default is None or default >= vocab_size else (default,)
    return token_ids(raw[name], f"config.json: {name}", vocab_size=vocab_size)


def _without_null(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config without a field whose null means the same as its absence."""
    return {key: value for key, value in raw.items() if key != name} if raw.get(name, 0) is None else raw
