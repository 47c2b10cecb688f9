"""config.json means here what it means to transformers: every default, and every mixture of fields that is accepted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from export.model.description import Activation, Block, Mlp, ModelConfig
from export.model.families.architectures import parse_config
from export.model.families.table import ARCHITECTURES
from export.model.rope import attention_factor, inverse_frequencies
from runtime.errors import InvalidCheckpoint
from tests.support.tiny.checkpoint import LLAMA3, YARN
from tests.support.tiny.stand_ins import STAND_INS

pytestmark = pytest.mark.oracle

NULL = "null"
"""In the tables below: the field is there and null."""

WHOLE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}

DYNAMIC = {"type": "dynamic", "factor": 3.0}
LINEAR = {"type": "linear", "factor": 2.0}
VALUES: dict[str, list[Any]] = {
    "head_dim": [8, 16, NULL],
    "num_key_value_heads": [1, 8, 32, NULL],
    "rms_norm_eps": [1e-5, 1e-6],
    "rope_theta": [10000.0, 1000000],
    "rope_scaling": [
        *(NULL, LINEAR, DYNAMIC, LLAMA3),
        *(YARN, YARN | {"beta_fast": 16, "truncate": False}, {"rope_type": "default"}),
    ],
    "rope_parameters": [
        NULL,
        {"rope_type": "default", "rope_theta": 1e6},
        {**YARN, "rope_theta": 10000, "mscale": 0.7, "mscale_all_dim": 1.0},
        {**LLAMA3, "rope_theta": 1e6},
        {"rope_type": "linear", "factor": 4},
    ],
    "tie_word_embeddings": [True, False],
    "sliding_window": [NULL, 16, 4096],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 28],
    "layer_types": [["full_attention"] * 3, ["sliding_attention", "full_attention", "sliding_attention"]],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "eos_token_id": [4, [4, 5], NULL],
    "bos_token_id": [0, NULL],
    "max_position_embeddings": [256, 8192],
}


WITHOUT_ROTARY = ("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "granitemoehybrid", "mpt", "opt")


def theirs_of(raw: dict[str, Any], directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    (directory / "config.json").write_text(json.dumps(raw))
    return transformers.AutoConfig.from_pretrained(directory)


def assert_same(ours: ModelConfig, theirs: Any, raw: dict[str, Any]) -> None:
    """Everything that a graph is built from."""
    assert ours.hidden_size == theirs.hidden_size
    assert_same_mlps(ours, theirs)
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    if raw["model_type"] != "falcon":  # its field is read in one of two architectures
        assert ours.num_kv_heads == (getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads)
    head_dim = getattr(theirs, "qk_head_dim", None) or getattr(theirs, "head_dim", None)
    head_dim = head_dim or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.vocab_size == theirs.vocab_size
    lengths = [getattr(theirs, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    assert ours.max_position_embeddings == next((length for length in lengths if length), 2048)  # BLOOM has none
    # The norms inside latent attention have one of their own, in the model's code.
    assert {norm.epsilon for norm in ours.norms if "_a_layernorm" not in norm.name} == {epsilon_of(theirs)}
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert {mlp.activation for block in ours.blocks for mlp in mlps_of(block)} == {ACTIVATIONS[activation_of(theirs)]}
    assert tuple(block.attention.window for block in ours.attention_blocks) == windows_of(theirs)
    for name, found in (
        ("eos_token_id", ours.eos_ids),
        ("bos_token_id", () if ours.bos_id is None else (ours.bos_id,)),
    ):
        ids = getattr(theirs, name)
        listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
        # A family's default need not be in a small vocabulary.
        assert list(found) == [one for one in listed if raw.get(name) is not None or one < ours.vocab_size], name
    if raw["model_type"] in ("llama", "qwen3"):
        assert ours.attention.qkv.has_bias == ours.attention.o.has_bias == theirs.attention_bias
    if raw["model_type"] == "llama":
        assert {mlp.up.has_bias for block in ours.blocks for mlp in mlps_of(block)} == {theirs.mlp_bias}
    if raw["model_type"] not in ("cohere2", "exaone4", "smollm3"):  # in which layers may have none
        assert bool(ours.rotaries) == (raw["model_type"] not in WITHOUT_ROTARY)
    attentions = [block.attention for block in ours.attention_blocks]
    for rotary, has_window in {(attention.rotary, attention.window is not None) for attention in attentions}:
        if rotary is None:
            continue
        frequencies, factor = rope_of(theirs, rotary.dim, "sliding_attention" if has_window else "full_attention")
        # Theirs are computed in float32.
        np.testing.assert_allclose(inverse_frequencies(rotary.rope, rotary.dim), frequencies, rtol=1e-5)
        assert attention_factor(rotary.rope) == pytest.approx(factor)


def assert_same_mlps(ours: ModelConfig, theirs: Any) -> None:
    """Inner channels, and how many experts there are and are chosen."""
    inner = inner_of(theirs)
    for block in ours.blocks:
        if isinstance(block.mlp, Mlp):
            assert block.mlp.down.num_inputs == inner
            continue
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        assert len(block.mlp.experts) == next(getattr(theirs, name) for name in names if hasattr(theirs, name))
        assert block.mlp.routing.top_k == theirs.num_experts_per_tok
        sizes = {expert.down.num_inputs for expert in block.mlp.experts}
        assert sizes == {getattr(theirs, "moe_intermediate_size", inner)}
        if hasattr(theirs, "norm_topk_prob"):
            assert block.mlp.routing.is_normalized == theirs.norm_topk_prob
        assert block.mlp.routing.scale == getattr(theirs, "routed_scaling_factor", 1)


ACTIVATIONS = {
    "silu": Activation.SILU,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


def inner_of(theirs: Any) -> int:
    """Channels of the MLP. LFM2's code changes what its config says."""
    if theirs.model_type == "lfm2":
        import torch
        from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

        with torch.device("meta"):
            return int(Lfm2MLP(theirs).w1.out_features)
    sizes = [getattr(theirs, name, None) for name in ("intermediate_size", "ffn_dim", "ffn_hidden_size")]
    return int(next((size for size in sizes if size), 4 * theirs.hidden_size))


def activation_of(theirs: Any) -> str:
    """gemma2 computes by hidden_activation, GPT-2 by activation_function, Falcon by activation; some have no field."""
    names = ("hidden_activation", "activation_function", "hidden_act", "activation")
    fixed = {"bloom": "gelu_new", "mpt": "gelu"}.get(theirs.model_type, "silu")
    return str(next((getattr(theirs, name) for name in names if hasattr(theirs, name)), fixed))


def epsilon_of(theirs: Any) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    return float(next((getattr(theirs, name) for name in names if hasattr(theirs, name)), 1e-5))


def mlps_of(block: Block) -> Sequence[Mlp]:
    return [block.mlp] if isinstance(block.mlp, Mlp) else block.mlp.mlps


def windows_of(theirs: Any) -> tuple[int | None, ...]:
    """Of the layers with attention, as the model code of each family reads them: some have none, some one for all, the
    others by layer_types."""
    num_layers, window = int(theirs.num_hidden_layers), getattr(theirs, "sliding_window", None)
    if theirs.model_type in ("mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"):
        return tuple(window for _ in range(num_layers))
    if theirs.model_type == "gpt_neo":
        return tuple(theirs.window_size if kind == "local" else None for kind in theirs.attention_layers)
    kinds = [
        kind
        for kind in getattr(theirs, "layer_types", None) or ["full_attention"] * num_layers
        if kind in ("full_attention", "sliding_attention", "hybrid")
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope_of(theirs: Any, head_dim: int, layer_type: str) -> tuple[Any, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if theirs.model_type == "gptj":  # which has it in its code alone
        return 1.0 / 10_000 ** (np.arange(0, head_dim, 2) / head_dim), 1.0
    has_both = layer_type in theirs.rope_parameters
    found = theirs.rope_parameters[layer_type] if has_both else theirs.rope_parameters
    if found["rope_type"] == "default":
        return 1.0 / found["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim), 1.0
    kind = ROPE_INIT_FUNCTIONS[found["rope_type"]]
    frequencies, factor = kind(theirs, layer_type=layer_type) if has_both else kind(theirs)
    return frequencies.numpy(), float(factor)


FAMILIES = sorted(set(ARCHITECTURES) - set(STAND_INS))
"""The families that transformers has."""
SHARED_NAMES = [name for name in FAMILIES if not ARCHITECTURES[name].aliases and name != "olmo"]
"""Families that call no field otherwise than WHOLE does; OLMo has no epsilon."""

HYBRID_NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    **{name: {"full_attention_interval": 2} for name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")},
}
"""Of hybrids: fields without which none of the three layers of WHOLE has attention."""


NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["full_attention", *["linear_attention"] * 31]},
    "deepseek_v2": {"num_experts_per_tok": 6, "num_key_value_heads": None},
    "deepseek_v3": {"num_key_value_heads": None},
    "glm4_moe": {"head_dim": 128},
}
"""What a config of these families must have: transformers' defaults fit no model."""


@pytest.mark.parametrize("family", SHARED_NAMES)
def test_every_missing_field_has_the_default_of_the_family(family: str, tmp_path: Path) -> None:
    for missing in (None, *WHOLE):
        given = {name: value for name, value in WHOLE.items() if name != missing}
        needed = NEEDED if missing == "num_hidden_layers" else HYBRID_NEEDED
        raw = {"model_type": family, **needed.get(family, {}), **given}
        if missing in ("num_attention_heads", "num_key_value_heads"):  # these fit every family's default
            raw |= {"hidden_size": 960}
            raw |= {"num_key_value_heads": 4} if missing == "num_attention_heads" else {"num_attention_heads": 160}
        raw |= {} if family in HYBRID_NEEDED else NEEDED.get(family, {})
        assert_same(parse_config(raw), theirs_of(raw, tmp_path), raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_the_model_type_alone_is_the_family(family: str, tmp_path: Path) -> None:
    raw = {"model_type": family, **NEEDED.get(family, {})}
    assert_same(parse_config(raw), theirs_of(raw, tmp_path), raw)


@pytest.mark.filterwarnings("ignore")  # transformers warns of much that it then reads all the same
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(SHARED_NAMES),
    chosen=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}),
    missing=st.sets(st.sampled_from(sorted(WHOLE)), max_size=2),
)
@example(
    family="qwen2",
    chosen={
        "head_dim": NULL,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    missing=set(),
)
def test_accepted_configs_mean_the_same_to_transformers(
    family: str, chosen: dict[str, Any], missing: set[str], tmp_path: Path
) -> None:
    """A refusal is always safe, so refused mixtures are not compared; which are accepted, the tests above hold."""
    values = {**{name: value for name, value in WHOLE.items() if name not in missing}, **chosen}
    given = {name: None if value == NULL else value for name, value in values.items()}
    raw = {"model_type": family, **HYBRID_NEEDED.get(family, {}), **given}
    try:
        ours = parse_config(raw)
    except InvalidCheckpoint:
        return
    try:
        theirs = theirs_of(raw, tmp_path)
    except Exception as error:  # stricter than transformers 4, which wrote configs with null where a number belongs
        assert None in raw.values() or "validate_architecture" in str(error), raw  # the latter: InternLM3, IQuest
        return
    try:
        assert_same(ours, theirs, raw)
    except TypeError:  # transformers 5 multiplies a head_dim that is null, or absent from a Mistral, for yarn
        assert raw.get("head_dim", 0) is None, raw


def test_both_names_of_the_rotary_settings_are_read(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta, rope_scaling and torch_dtype, transformers 5 rope_parameters and dtype."""
    older = {**WHOLE, "model_type": "llama", "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    newer = {**WHOLE, "model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "dtype": "bfloat16"}
    del newer["rope_theta"]
    assert parse_config(older) == parse_config(newer)
    for raw in (older, newer):
        assert_same(parse_config(raw), theirs_of(raw, tmp_path), raw)
