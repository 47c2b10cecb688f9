"""Smoothing changes units, not results: the smoothed checkpoint computes in float32 what the original does."""

import numpy as np
import pytest

from export.model.description import LM_HEAD, ModelConfig, Site
from export.model.families.architectures import parse_config
from export.model.reference.forward import run_reference
from export.quantize.int8.smoothquant import SmoothedCheckpoint, producer_of, smoothed_config, smoothing_vector
from tests.support.tiny.architectures import BEYOND_LLAMA, RandomCheckpoint
from tests.support.tiny.checkpoint import VARIANTS, config_of

# float32 sums of a hundred terms near 1, scaled up and down by factors of up to ten.
TOLERANCE = 2e-4

CONFIGS = {**{variant: config_of(variant) for variant in VARIANTS}, **BEYOND_LLAMA}


def random_vectors(config: ModelConfig) -> dict[Site, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = {}
    for linear in config.linears:
        if linear.is_quantizable:
            highest = rng.uniform(0.1, 10, linear.num_inputs).astype(np.float32)
            ones = np.ones(linear.num_inputs, np.float32)
            vectors[linear.site] = smoothing_vector(highest, ones, 0.8, site=linear.site, config=config)
    return vectors


@pytest.mark.parametrize("name", CONFIGS)
def test_a_smoothed_checkpoint_computes_the_same(name: str) -> None:
    config = parse_config(CONFIGS[name])
    checkpoint, vectors = RandomCheckpoint(config), random_vectors(config)
    smoothed, own = SmoothedCheckpoint(checkpoint, config, vectors), smoothed_config(config, vectors)
    sequences = [[5, 17, 250, 3, 99, 12, 7], [1, 2, 3]]
    exact = run_reference(checkpoint, config, sequences)
    moved = run_reference(smoothed, own, sequences)
    assert not own.tie_word_embeddings and own.vocab_size == smoothed.tensors[own.head.linear.weight_names[0]].shape[0]
    for idx, sequence in enumerate(sequences):
        difference = exact.logits(idx, 0, len(sequence)) - moved.logits(idx, 0, len(sequence))
        assert np.abs(difference).max() < TOLERANCE
    for site in vectors:
        for weight in own.by_site[site].weight_names:
            original = checkpoint.load(weight if weight in checkpoint.tensors else f"{config.embedding.name}.weight")
            changes = not np.array_equal(smoothed.load(weight), original)
            assert changes == (producer_of(config, site) is not None or weight in _divided(config, vectors)), weight


def _divided(config: ModelConfig, vectors: dict[Site, np.ndarray]) -> set[str]:
    producers = (producer_of(config, site) for site in vectors)
    return {f"{producer.name}.weight" for producer in producers if producer is not None}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("llama", set()),
        ("gemma2", set()),
        ("gpt2", {"down"}),
        ("cohere", {"qkv", "gate_up"}),
        ("mixtral", {"gate_up.0", "gate_up.1", "gate_up.2", "gate_up.3"}),
    ],
)
def test_what_nothing_can_divide_is_left_out(name: str, plain: set[str]) -> None:
    config = parse_config(CONFIGS[name])
    sites = [linear.site for linear in config.linears if linear.is_quantizable]
    assert {site.kind for site in sites if producer_of(config, site) is None} == plain
    assert producer_of(config, Site(config.num_layers, LM_HEAD)) == config.final_norm


def test_dead_channels_keep_their_units() -> None:
    config = parse_config(config_of("llama"))
    highest = np.array([0, 1, 4, 0], np.float32)
    weight = np.array([1, 0, 1, 0], np.float32)
    vector = smoothing_vector(highest, weight, 0.5, site=Site(0, "down"), config=config)
    assert vector.tolist() == [1, 1, 2, 1]


def test_heads_that_share_keys_and_values_share_the_vector() -> None:
    config = parse_config(config_of("llama"))  # 4 heads of 16, 2 for keys and values
    highest = np.random.default_rng(0).uniform(1, 9, 64).astype(np.float32)
    vector = smoothing_vector(highest, np.ones(64, np.float32), 1.0, site=Site(0, "o"), config=config)
    heads = vector.reshape(4, 16)
    assert np.array_equal(heads[0], heads[1]) and np.array_equal(heads[2], heads[3])
    assert np.allclose(heads[0], highest.reshape(4, 16)[:2].max(0))
