"""Rotation changes the basis and nothing else: the same logits, and no channel that stands out."""

import numpy as np
import pytest

from export.model.families.architectures import parse_config
from export.model.reference.forward import run_reference
from export.quantize.int8.rotation import RotatedCheckpoint, Rotation, rotated_config, stream_obstacle
from export.quantize.int8.smoothquant import SmoothedCheckpoint
from tests.support.tiny.architectures import BEYOND_LLAMA, RandomCheckpoint
from tests.support.tiny.checkpoint import config_of


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


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3", *BEYOND_LLAMA])
def test_the_rotated_model_computes_the_same(name: str) -> None:
    config = parse_config(BEYOND_LLAMA[name] if name in BEYOND_LLAMA else config_of(name))
    checkpoint = RandomCheckpoint(config)
    sequences = [np.random.default_rng(i).integers(0, config.vocab_size, 9 + i).tolist() for i in range(2)]
    exact = run_reference(checkpoint, config, sequences)
    rotated_checkpoint, own = RotatedCheckpoint(checkpoint, config), rotated_config(config)
    rotated = run_reference(rotated_checkpoint, own, sequences)
    for idx, sequence in enumerate(sequences):
        expected = exact.logits(idx, 0, len(sequence))
        # float32 sums in another order
        assert np.abs(rotated.logits(idx, 0, len(sequence)) - expected).max() < 1e-4 * np.abs(expected).max() + 1e-5
    for block in (block for block in own.blocks if block.has_attention):
        values, o = block.attention.qkv.weight_names[-1], block.attention.o.weight_names[0]
        for name_of_weight in (values, o):
            changed = rotated_checkpoint.load(name_of_weight)
            is_rotated = not np.allclose(changed, checkpoint.load(name_of_weight), atol=1e-3)
            assert is_rotated == (block.attention.clip is None)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_pieces_are_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("export.checkpoint.protocol.PIECE_ROWS", 7)
    config = parse_config(BEYOND_LLAMA[name] if name in BEYOND_LLAMA else config_of(name))
    rotated, own = RotatedCheckpoint(RandomCheckpoint(config), config), rotated_config(config)
    site = own.head.linear.site
    vectors = {site: np.linspace(1, 2, own.hidden_size, dtype=np.float32)}
    for checkpoint in (rotated, SmoothedCheckpoint(rotated, own, vectors)):
        for tensor in (f"{own.embedding.name}.weight", *own.blocks[0].attention.o.weight_names, "lm_head.weight"):
            if tensor in checkpoint.tensors:
                pieces = list(checkpoint.pieces(tensor))
                assert max(map(len, pieces)) == 7
                # A product of fewer rows may add in another order.
                assert np.allclose(np.concatenate(pieces), checkpoint.load(tensor), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", None),
        ("phi3", None),
        ("mixtral", None),
        ("gemma2", "norm behind"),
        ("gpt2", "layer norm"),
        ("cohere", "layer norm"),
    ],
)
def test_the_stream_is_rotated_where_that_is_exact(name: str, reason: str | None) -> None:
    config = parse_config(BEYOND_LLAMA[name] if name in BEYOND_LLAMA else config_of(name))
    obstacle = stream_obstacle(config)
    assert (obstacle is None) if reason is None else (obstacle is not None and reason in obstacle)
    embedding = f"{config.embedding.name}.weight"
    checkpoint = RandomCheckpoint(config)
    is_same = np.array_equal(RotatedCheckpoint(checkpoint, config).load(embedding), checkpoint.load(embedding))
    assert is_same == (reason is not None)
