"""Rotation changes the basis and nothing else: the same logits, and no channel that stands out."""

from pathlib import Path

import numpy as np
import pytest

from export.model.architectures import parse_config
from export.model.reference import run_reference
from export.quantize.int8.rotation import RotatedCheckpoint, Rotation, rotated_config
from export.sources.open import open_checkpoint
from tests.support.tiny_checkpoint import config_of, write_checkpoint


@pytest.mark.parametrize("n", [1, 2, 9, 48, 64, 96, 128, 576, 4096])
def test_a_rotation_is_orthogonal_and_repeatable(n: int) -> None:
    rotation = Rotation(n)
    columns = np.eye(n, dtype=np.float32)[: min(n, 600)]
    rotated = rotation.apply(columns)
    assert np.abs(rotated @ rotated.T - np.eye(len(columns))).max() < 1e-5  # float32 sums of n products
    assert np.array_equal(rotated, Rotation(n).apply(columns))
    matrix = rotation.apply(np.eye(n, dtype=np.float32)) if n < 600 else None
    if matrix is not None:
        x = np.random.default_rng(0).standard_normal((n, 3)).astype(np.float32)
        assert np.allclose(rotation.apply_to_rows(x), matrix.T @ x, atol=1e-5)


def test_an_outlier_channel_is_spread() -> None:
    x = np.random.default_rng(0).standard_normal((50, 576)).astype(np.float32)
    x[:, 7] *= 500
    assert np.abs(Rotation(576).apply(x)).max() < np.abs(x).max() / 5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_rotated_model_computes_the_same(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", config_of(family)))
    config = parse_config(checkpoint.config)
    sequences = [np.random.default_rng(i).integers(0, config.vocab_size, 9 + i).tolist() for i in range(2)]
    exact = run_reference(checkpoint, config, sequences)
    rotated_checkpoint = RotatedCheckpoint(checkpoint, config)
    rotated = run_reference(rotated_checkpoint, rotated_config(config), sequences)
    for idx, sequence in enumerate(sequences):
        expected = exact.logits(idx, 0, len(sequence))
        # float32 sums in another order
        assert np.abs(rotated.logits(idx, 0, len(sequence)) - expected).max() < 1e-4 * np.abs(expected).max() + 1e-5
    assert "lm_head.weight" in rotated_checkpoint.tensors
    for layer in range(config.num_layers):
        for name in ("q_proj", "v_proj", "o_proj"):
            full = f"model.layers.{layer}.self_attn.{name}.weight"
            assert not np.allclose(rotated_checkpoint.load(full), checkpoint.load(full), atol=1e-3)
