"""Smoothing changes units, not results: the smoothed checkpoint computes in float32 what the original does."""

from pathlib import Path

import numpy as np
import pytest

from export.model.architectures import parse_config
from export.model.description import ModelConfig
from export.model.reference import PROJECTIONS, run_reference
from export.quantize.int8.smoothquant import SmoothedCheckpoint, smoothed_config, smoothing_vector
from export.model.description import Site
from export.sources.open import open_checkpoint
from tests.support.tiny_checkpoint import VARIANTS, config_of, write_checkpoint

# float32 sums of a hundred terms near 1, scaled up and down by factors of up to ten.
TOLERANCE = 2e-4


def random_vectors(config: ModelConfig, seed: int = 0) -> dict[Site, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {
        "qkv": config.hidden_size,
        "gate_up": config.hidden_size,
        "o": config.num_heads * config.head_dim,
        "down": config.intermediate_size,
    }
    vectors = {}
    for layer in range(config.num_layers):
        for kind in PROJECTIONS:
            site = Site(layer, kind)
            highest = rng.uniform(0.1, 10, sizes[kind]).astype(np.float32)
            ones = np.ones(sizes[kind], np.float32)
            vectors[site] = smoothing_vector(highest, ones, 0.8, site=site, config=config)
    site = config.head.linear.site
    vectors[site] = rng.uniform(0.1, 10, config.hidden_size).astype(np.float32)
    return vectors


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_smoothed_checkpoint_computes_the_same(tmp_path: Path, variant: str) -> None:
    raw = config_of(variant)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, raw))
    config = parse_config(raw)
    vectors = random_vectors(config)
    smoothed, own = SmoothedCheckpoint(checkpoint, config, vectors), smoothed_config(config, vectors)
    sequences = [[5, 17, 250, 3, 99, 12, 7], [1, 2, 3]]
    exact = run_reference(checkpoint, config, sequences)
    moved = run_reference(smoothed, own, sequences)
    assert not own.tie_word_embeddings and own.vocab_size == smoothed.tensors["lm_head.weight"].shape[0]
    for idx, sequence in enumerate(sequences):
        difference = exact.logits(idx, 0, len(sequence)) - moved.logits(idx, 0, len(sequence))
        assert np.abs(difference).max() < TOLERANCE
    changed = {
        name for name in smoothed.tensors if not np.array_equal(smoothed.load(name), _original(checkpoint, name))
    }
    assert {name for name in changed if "embed" in name} == set()
    assert len([name for name in changed if name.endswith("proj.weight")]) == 7 * config.num_layers


def _original(checkpoint: object, name: str) -> np.ndarray:
    tensors = checkpoint.tensors  # type: ignore[attr-defined]
    array: np.ndarray = checkpoint.load(name if name in tensors else "model.embed_tokens.weight")  # type: ignore[attr-defined]
    return array


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
