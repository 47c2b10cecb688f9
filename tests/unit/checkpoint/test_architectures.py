"""config.json to ModelConfig: what is read, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.model.checks.model_reading import read_model
from export.model.description import Experts
from export.model.families.architectures import as_described, parse_config
from export.model.families.refused import REFUSED
from export.model.families.table import ARCHITECTURES
from export.model.reference.forward import run_reference
from export.model.rope import attention_factor, inverse_frequencies
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.tiny.architectures import BEYOND_LLAMA, COHERE, GEMMA2, GPT2, PHI3, RandomCheckpoint
from tests.support.tiny.checkpoint import LLAMA3, VARIANTS, YARN, config_of
from tests.support.tiny.experts import MIXTRAL


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_read(variant: str) -> None:
    config = parse_config(config_of(variant))
    assert config.num_layers == 3
    assert (config.eos_ids, config.bos_id) == ((2,), 1)


def windows_of(raw: dict[str, Any]) -> tuple[int | None, ...]:
    return tuple(block.attention.window for block in parse_config(raw).blocks)


def test_windows_follow_the_family_and_layer_types_win() -> None:
    assert windows_of(config_of("mistral-sliding")) == (24, 24, 24)
    assert windows_of(config_of("qwen2-sliding")) == (None, 16, 16)
    assert windows_of(config_of("qwen2", sliding_window=16)) == (None, None, None)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows_of(config_of("qwen2-sliding", layer_types=kinds)) == (16, None, 16)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "alpha": 2.0}}, "ntk"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "surprise": 3}}, "surprise"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"hidden_size": 36}, "head_dim 9"),
    ],
)
def test_what_has_no_graph_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_config(config_of("llama", **changes))


def test_an_unknown_model_type_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        parse_config({"model_type": "mamba"})
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_theta": 0}, "theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": ["2"]}, "eos_token_id"),
    ],
)
def test_nonsense_is_refused_by_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=named):
        parse_config(config_of("llama", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer", "max_sequence_length": 2048, "_name_or_path": "/home/me/base"},
        {"max_length": 4096, "temperature": 0.6, "top_p": 0.9, "do_sample": True, "num_beams": 1, "min_length": 0},
        {"pretraining_tp": 2, "neftune_noise_alpha": 5, "unsloth_version": "2025.1", "unsloth_fixed": True},
        {"hidden_dropout_prob": 0.1, "embd_pdrop": 0.0, "resid_dropout": 0.1, "attention_dropout": 0.1},
        {"quantization_config": None, "rope_scaling": None, "sliding_window": None, "mystery": None, "another": []},
        {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": 4096},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16", "transformers_version": "5.1.0", "use_cache": False},
        {"is_decoder": True, "is_encoder_decoder": False, "is_causal": True, "add_cross_attention": False},
        {"partial_rotary_factor": 1.0, "logit_scale": 1, "num_experts": 0, "rope_interleaved": False},
        {"architectures": None, "auto_map": {"AutoModelForCausalLM": "someone/repo--modeling_flash.LlamaForCausalLM"}},
        {"architectures": ["LLaMAForCausalLM"], "pad_token_id": -1, "head_dim": None, "num_key_value_heads": None},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 64}},
    ],
)  # fmt: skip
def test_fields_without_effect_have_none(changes: dict[str, Any]) -> None:
    plain = {"num_key_value_heads": None} if "num_key_value_heads" in changes else {}
    assert parse_config(config_of("llama", **changes)) == parse_config(config_of("llama", **plain))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"logit_scale": 0.5}, r"logit_scale = 0\.5"),
        ("llama", {"is_causal": False}, "is_causal = False is not supported .*; supported: True"),
        ("llama", {"use_rope": False}, "use_rope = False"),
        ("llama", {"mystery": 0}, "mystery = 0"),
        ("llama", {"mystery": {"a": list(range(99))}}, r"mystery = \{'a': \[0, 1.*\.\.\. is not"),
        ("llama", {"text_config": {"hidden_size": 8}}, "text_config"),
        ("llama", {"sliding_window": 16}, "sliding_window = 16 is not supported for model_type 'llama'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification.*LlamaForCausalLM"),
        ("llama", {"architectures": ["LlamaModel"]}, "LlamaModel"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}, "auto_map names code"),
        ("mistral", {"sliding_window": 16, "use_sliding_window": False}, "use_sliding_window is false and sliding_w"),
        ("qwen2", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3}, "no window is switched on"),
        ("qwen2", {"layer_types": ["full_attention"]}, "each of the 3 layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2", {"layer_types": 5}, "got 5"),
        ("llama", {"rope_scaling": {"factor": 4.0}}, r"factor 4\.0 and no rope_type"),
        ("llama", {"rope_scaling": {"type": "default", "factor": 4.0}}, r"rope_scaling\.factor = 4\.0"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters has settings by"),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "two types"),
        ("llama", {"rope_scaling": {"type": []}}, r"rope type \[\]"),
        ("llama", {"rope_scaling": YARN, "rope_parameters": LLAMA3}, "say different things"),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000, and rope_p"),
        ("llama", {"rope_scaling": {**YARN, "factor": None}}, r"rope_scaling\.factor must be a positive number"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor 4 must be less"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast of at least beta_slow"),
        ("llama", {"rope_scaling": {**YARN, "factor": 1e9}}, "at most 65,536"),
        ("llama", {"rope_theta": "x"}, "rope_theta must be a positive number, got 'x'"),
        ("llama", {"num_hidden_layers": 10**11}, "from 1 to 1,024, got 100000000000"),
        ("llama", {"vocab_size": 10**400}, "vocab_size must be an integer"),
        ("llama", {"eos_token_id": 320}, r"eos_token_id 320 is outside the vocabulary of 320 tokens \(0 to 319\)"),
        ("llama", {"eos_token_id": [2, -1]}, "eos_token_id -1 is outside"),
        ("llama", {"bos_token_id": 999}, "bos_token_id 999"),
        ("llama", {"hidden_size": 60, "num_attention_heads": 8}, "hidden_size 60 is not a multiple"),
        ("qwen3", {"head_dim": None}, "head_dim must be an integer"),
    ],
)  # fmt: skip
def test_every_other_field_is_refused_with_its_value(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=named):
        parse_config(config_of(family, **changes))


def test_a_missing_number_of_key_value_heads_is_told_as_the_default_of_the_family() -> None:
    config = config_of("qwen2")
    del config["num_key_value_heads"]
    with pytest.raises(InvalidCheckpoint, match=r"not a multiple of num_key_value_heads 32 \(the family's default"):
        parse_config(config)


def test_yarn_keeps_fast_waves_and_stretches_slow_ones() -> None:
    plain = parse_config(config_of("llama", head_dim=64, hidden_size=256)).rotaries[0].rope
    yarn = parse_config(config_of("llama", head_dim=64, hidden_size=256, rope_scaling=YARN)).rotaries[0].rope
    assert plain is not None and yarn is not None
    ratio = inverse_frequencies(yarn, 64) / inverse_frequencies(plain, 64)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 4)
    assert np.all(np.diff(ratio) <= 0)
    assert attention_factor(yarn) == pytest.approx(0.1 * np.log(4) + 1)
    assert attention_factor(plain) == 1


def test_two_sets_of_frequencies_are_chosen_between_once() -> None:
    config = parse_config(PHI3)
    rope = config.rotaries[0].rope
    assert (rope.original_max_len, rope.factor) == (64, 4)
    short, long = (config.for_length(length).rotaries[0].rope for length in (64, 65))
    assert short is not None and long is not None
    ratio = inverse_frequencies(short, 8) / inverse_frequencies(long, 8)
    assert ratio == pytest.approx([2 / 1, 3 / 1.1, 4 / 1.2, 5 / 1.3])
    assert attention_factor(long) == pytest.approx(np.sqrt(1 + np.log(4) / np.log(64)))


@pytest.mark.parametrize(
    ("raw", "changes", "named"),
    [
        (PHI3, {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor must be a list"),
        (PHI3, {"partial_rotary_factor": 1.0}, "short_factor has 4 numbers, and 8 pairs"),
        (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be at most 1"),
        (PHI3, {"sliding_window": 16, "layer_types": ["full_attention"] * 3}, "sliding_window in every layer"),
        (MIXTRAL, {"num_experts_per_tok": 5}, "more than the 4 experts of a layer"),
        (GEMMA2, {"hidden_act": "silu"}, "reads hidden_activation"),
        (GEMMA2, {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "silu"}, "remove the wrong one"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"hidden_size": 32}, "remove the wrong one"),
        (COHERE, {"use_qk_norm": True}, "use_qk_norm"),
        (COHERE, {"rms_norm_eps": 1e-6}, "reads layer_norm_eps"),
    ],
)
def test_each_family_refuses_what_it_cannot_honour(raw: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=named):
        parse_config({**raw, **changes})


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_without_a_row_is_refused_with_the_reason(model_type: str) -> None:
    assert model_type not in ARCHITECTURES
    with pytest.raises(UnsupportedModel, match=re.escape(f"{model_type!r} is not supported: {REFUSED[model_type]}")):
        parse_config({"model_type": model_type})


@pytest.mark.parametrize("raw", BEYOND_LLAMA.values(), ids=BEYOND_LLAMA)
def test_a_description_is_whole(raw: dict[str, Any]) -> None:
    config = parse_config(raw)
    assert [linear.site for linear in config.linears] == list(config.by_site), "sites are unique"
    for block in config.blocks:
        if block.has_attention:
            a = block.attention
            assert a.o.shape == (config.hidden_size, a.num_heads * (a.latent.value_dim if a.latent else a.head_dim))
            assert a.qkv.shape == (sum(a.split_sizes), config.hidden_size)
        else:
            assert block.mixer.linears[-1].num_outputs == 64 and block.mixer.states
        for linear in block.linears:
            assert linear.reads is None or linear in block.readers_of(linear.reads)
    untied = config.untied()
    assert untied.head.linear.weight_names == ["lm_head.weight"] and not untied.tie_word_embeddings
    for block in config.blocks:
        if isinstance(block.mlp, Experts):
            share = block.mlp.routing.top_k / len(block.mlp.experts)
            for linear in block.mlp.linears:
                is_chosen = any(linear in expert.linears for expert in block.mlp.experts)
                whole = linear.num_outputs * linear.num_inputs
                assert config.num_macs(linear.site) == int(whole * share if is_chosen else whole)


def test_a_checkpoint_without_its_head_has_names_without_a_prefix(tmp_path: Path) -> None:
    """As GPT-2's own on the hub, with the masks that it carries along."""
    config = parse_config(GPT2)
    whole = RandomCheckpoint(config)
    tensors = {name.removeprefix("transformer."): whole.load(name) for name in whole.tensors if ".attn." not in name}
    for layer in range(3):
        parts = [whole.load(f"transformer.h.{layer}.attn.{part}.weight") for part in "qkv"]
        biases = [whole.load(f"transformer.h.{layer}.attn.{part}.bias") for part in "qkv"]
        tensors[f"h.{layer}.attn.c_attn.weight"] = np.ascontiguousarray(np.concatenate(parts).T)
        tensors[f"h.{layer}.attn.c_attn.bias"] = np.concatenate(biases)
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 256, 256), np.float32))
        tensors[f"h.{layer}.attn.c_proj.bias"] = whole.load(f"transformer.h.{layer}.attn.c_proj.bias")
        tensors[f"h.{layer}.attn.c_proj.weight"] = np.ascontiguousarray(
            whole.load(f"transformer.h.{layer}.attn.c_proj.weight").T
        )
        for name in ("c_fc", "c_proj"):
            full = f"h.{layer}.mlp.{name}.weight"
            tensors[full] = np.ascontiguousarray(tensors[full].T)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    checkpoint = open_checkpoint(tmp_path)
    assert read_model(checkpoint) == config
    described = as_described(checkpoint)
    assert described.stored_name("transformer.h.0.attn.k.weight") == "h.0.attn.c_attn.weight"
    ids = [[5, 17, 250, 3, 99]]
    assert np.array_equal(
        run_reference(described, config, ids).logits(0, 0, 5), run_reference(whole, config, ids).logits(0, 0, 5)
    )
