"""Makes a `ModelConfig` from config.json, by its family's row in table.py.

A field that graphs would not honour is refused by name. A missing field has
transformers' default of the family, because tools omit fields with the default; the tests compare every default with
`AutoConfig`. Reads no files.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from export.checkpoint.config_fields import refuse_unknown, shown
from export.checkpoint.fused import FusedView
from export.checkpoint.protocol import Checkpoint
from export.checkpoint.scaled import ScaledView
from export.checkpoint.view import PrefixedView
from export.model.description import Activation, ModelConfig, Rotary
from export.model.families.config_values import flag, integer, number, token_ids
from export.model.families.layout import describe
from export.model.families.refused import REFUSED
from export.model.families.row import Architecture, Sizes
from export.model.families.table import ARCHITECTURES
from export.model.families.window_ropes import ropes_of
from export.model.families.windows import windows
from runtime.errors import InvalidCheckpoint, UnsupportedModel

_ROPE_KINDS = ("default", "dynamic", "linear", "llama3", "yarn", "longrope")
"""The rope types that a family reads if its row does not say otherwise."""

MAX_LAYERS = 1024
"""The largest published decoder has 126."""

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "gelu": Activation.GELU,
        "gelu_new": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
        "gelu_fast": Activation.GELU_TANH,
        "relu": Activation.RELU,
        "relu2": Activation.RELU2,
    }
)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check a config.json and describe its decoder.

    UnsupportedModel names a model type or field that is not supported, and lists what is. InvalidCheckpoint names a
    field with an invalid value.
    """
    arch = _architecture(raw)
    shared = _shared_names(raw, arch)
    if arch.rope and not (shared.get("rope_scaling") or shared.get("rope_parameters")):
        shared = {**shared, "rope_scaling": arch.rope}
    refuse_unknown(shared, arch.fields)
    defaults = arch.defaults
    sizes = _sizes(shared, arch)
    style = arch.style(shared, sizes)
    if not style.windows:
        own_kinds = {"layer_types": None} if style.mixers else {}  # those of a hybrid say which layers have attention
        windows({**shared, **own_kinds}, "never", sizes, defaults)  # refuses a window
    config = describe(
        str(raw["model_type"]),
        sizes,
        style,
        style.names or arch.names,
        ropes_of(
            shared,
            sizes.max_len,
            defaults.rope_theta,
            can_be_partial="partial_rotary_factor" in arch.fields,
            window_rope=arch.window_rope,
        ),
        is_tied=flag(shared, "tie_word_embeddings", default=defaults.is_tied),
    )
    for rotary in config.rotaries:
        _check_rotary(config, rotary, arch)
    return replace(
        config,
        eos_ids=_ids(shared, "eos_token_id", defaults.eos_id, sizes.vocab_size),
        unused=arch.unused(shared, sizes),
        bos_id=next(iter(_ids(shared, "bos_token_id", defaults.bos_id, sizes.vocab_size)), None),
    )


def _check_rotary(config: ModelConfig, rotary: Rotary, arch: Architecture) -> None:
    """Check that a rotary embedding fits the family and the size of the heads."""
    if rotary.rope.kind not in (arch.rope_kinds or _ROPE_KINDS):
        raise UnsupportedModel(
            f"config.json: the rope type {rotary.rope.kind!r} is not supported for model_type {config.model_type!r}; "
            f"supported: {', '.join(arch.rope_kinds or _ROPE_KINDS)}"
        )
    if rotary.dim < 2 or rotary.dim % 2:
        raise UnsupportedModel(
            f"config.json: {rotary.dim} of {rotary.head_dim} channels of a head would rotate; supported: even numbers"
        )
    for name, factors in (("short_factor", rotary.rope.short_factors), ("long_factor", rotary.rope.long_factors)):
        if rotary.rope.kind == "longrope" and len(factors) != rotary.dim // 2:
            raise InvalidCheckpoint(
                f"config.json: {name} has {len(factors)} numbers, and {rotary.dim // 2} pairs of channels are rotated"
            )


def as_described(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the description's tensors: fused matrices are split, transposed ones transposed back.

    A checkpoint without its LM head, as GPT-2's own is, has names without the prefix of the others.
    """
    arch = _architecture(checkpoint.config)
    prefix, _, table = f"{arch.names.embedding}.weight".partition(".")
    is_tied = flag(checkpoint.config, "tie_word_embeddings", default=arch.defaults.is_tied)
    if table in checkpoint.tensors and (is_tied or f"{arch.names.head}.weight" in checkpoint.tensors):
        checkpoint = PrefixedView(checkpoint, prefix, unprefixed=f"{arch.names.head}.weight")
    raw = _shared_names(checkpoint.config, arch)
    sizes = _sizes(raw, arch)
    splits = arch.splits(raw, sizes)
    if splits or arch.renames:
        checkpoint = FusedView(checkpoint, splits, renames=arch.renames)
    scales = arch.scales(raw, sizes)
    return ScaledView(checkpoint, scales) if scales else checkpoint


def _shared_names(raw: Mapping[str, Any], arch: Architecture) -> Mapping[str, Any]:
    """config.json with the family's own names of fields replaced by the shared ones.

    UnsupportedModel for a shared name that the family does not read; InvalidCheckpoint if two names' values differ.
    """
    own_names = {shared: own for own, shared in arch.aliases.items()}
    shared_names = {**arch.aliases, **arch.synonyms}
    found: dict[str, Any] = {}
    raw = arch.prepared(raw)
    for name, value in raw.items():
        if name in own_names and own_names[name] not in raw:
            raise UnsupportedModel(
                f"config.json: {name} = {shown(value)} is not supported for model_type {raw['model_type']!r}, which "
                f"reads {own_names[name]}"
            )
        shared = shared_names.get(name, name)
        if shared in found and found[shared] != value:
            other = next(other for other in raw if other != name and shared_names.get(other, other) == shared)
            raise InvalidCheckpoint(
                f"config.json: {name} is {shown(value)}, and {other} {shown(raw[other])}; remove the wrong one"
            )
        found[shared] = value
    return found


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    """The row of model_type. UnsupportedModel if `architectures` or `auto_map` name another kind of class."""
    model_type = raw.get("model_type")
    arch = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if arch is None and isinstance(model_type, str) and model_type in REFUSED:
        raise UnsupportedModel(f"config.json: model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if arch is None:
        found = f"model_type {shown(model_type)} is not supported" if "model_type" in raw else "there is no model_type"
        raise UnsupportedModel(f"config.json: {found}; supported: {', '.join(sorted(ARCHITECTURES))}")
    # A class of another supported family is allowed: as in transformers, model_type decides.
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


def _sizes(raw: Mapping[str, Any], arch: Architecture) -> Sizes:
    """Read all sizes, and check that those of attention fit each other."""
    defaults = arch.defaults
    hidden_size = integer(raw, "hidden_size", defaults.hidden_size)
    num_heads = integer(raw, "num_attention_heads", defaults.num_heads)
    # In transformers, null means one key-value head per head, and a missing field the family's default.
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
    # For GPT-2, null means four times the hidden size.
    inner = raw if defaults.intermediate_size is not None else _without_null(raw, "intermediate_size")
    return Sizes(
        hidden_size=hidden_size,
        intermediate_size=integer(inner, "intermediate_size", defaults.intermediate_size or 4 * hidden_size),
        num_layers=integer(raw, "num_hidden_layers", defaults.num_layers, maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=integer(raw, "vocab_size", defaults.vocab_size),
        max_len=integer(raw, "max_position_embeddings", defaults.max_position_embeddings),
        norm_eps=number(raw, "rms_norm_eps", defaults.norm_eps),
        activation=_activation(raw, arch),
    )


def _activation(raw: Mapping[str, Any], arch: Architecture) -> Activation:
    name = raw.get("hidden_act", arch.defaults.activation)
    known = {**_ACTIVATIONS, **arch.activations}
    if not isinstance(name, str) or name not in known:
        raise UnsupportedModel(f"config.json: hidden_act {shown(name)} is not supported; supported: {', '.join(known)}")
    return known[name]


def _ids(raw: Mapping[str, Any], name: str, default: int | tuple[int, ...] | None, vocab_size: int) -> tuple[int, ...]:
    if name not in raw or (raw[name] is None and isinstance(default, tuple)):
        ids = default if isinstance(default, tuple) else () if default is None else (default,)
        return tuple(token_id for token_id in ids if token_id < vocab_size)  # a small vocabulary may lack it
    return token_ids(raw[name], f"config.json: {name}", vocab_size=vocab_size)


def _without_null(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config without a field that is null."""
    return {key: value for key, value in raw.items() if key != name} if raw.get(name, 0) is None else raw
