"""config.json to ModelConfig: what is read, and what is refused by name."""

from typing import Any

import numpy as np
import pytest

from export.architectures import ARCHITECTURES, parse_config
from export.rope import attention_factor, inverse_frequencies
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from tests.tiny_checkpoint import VARIANTS, YARN, config_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_read(variant: str) -> None:
    config = parse_config(config_of(variant))
    assert config.num_layers == 3
    assert len(config.sliding_windows) == 3
    assert (config.eos_ids, config.bos_id) == ((2,), 1)


def test_windows_follow_the_family_and_layer_types_win() -> None:
    assert parse_config(config_of("mistral-sliding")).sliding_windows == (24, 24, 24)
    assert parse_config(config_of("qwen2-sliding")).sliding_windows == (None, 16, 16)
    assert parse_config(config_of("qwen2", sliding_window=16)).sliding_windows == (None, None, None)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse_config(config_of("qwen2-sliding", layer_types=kinds)).sliding_windows == (16, None, 16)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
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


def test_yarn_keeps_fast_waves_and_stretches_slow_ones() -> None:
    plain = parse_config(config_of("llama", head_dim=64, hidden_size=256)).rope
    yarn = parse_config(config_of("llama", head_dim=64, hidden_size=256, rope_scaling=YARN)).rope
    ratio = inverse_frequencies(yarn, 64) / inverse_frequencies(plain, 64)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 4)
    assert np.all(np.diff(ratio) <= 0)
    assert attention_factor(yarn) == pytest.approx(0.1 * np.log(4) + 1)
    assert attention_factor(plain) == 1
