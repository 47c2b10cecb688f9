"""The text model of a checkpoint of text and images reads as if it had been saved alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.model.checks.model_reading import read_model
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint
from tests.support.tiny.architectures import write_random
from tests.support.tiny.hybrids import QWEN3_5


def wrapped(directory: Path, alone: Path, **changes: Any) -> Path:
    """The same model as transformers saves it with its vision tower and its drafting layers."""
    tensors = {
        name.replace("model.", "model.language_model.", 1): array
        for name, array in load_file(alone / "model.safetensors").items()
    }
    for name in ("model.visual.blocks.0.attn.qkv.weight", "mtp.layers.0.mlp.up_proj.weight"):
        tensors[name] = np.ones((4, 4), np.float32)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    text = {**QWEN3_5, "tie_word_embeddings": not changes.get("tie_word_embeddings")}
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}, "image_token_id": 5}
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize("is_tied", [True, False])
def test_it_reads_as_if_it_had_been_saved_alone(tmp_path: Path, is_tied: bool) -> None:
    raw = {**QWEN3_5, "tie_word_embeddings": is_tied}
    alone = open_checkpoint(write_random(tmp_path / "alone", raw))
    whole = open_checkpoint(wrapped(tmp_path / "whole", tmp_path / "alone", tie_word_embeddings=is_tied))
    assert read_model(whole) == read_model(alone)
    assert whole.tensors == alone.tensors
    for name in alone.tensors:
        np.testing.assert_array_equal(whole.load(name), alone.load(name))
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(np.concatenate(list(whole.pieces(embedding))), alone.load(embedding))
    np.testing.assert_array_equal(whole.load_rows(embedding, 3, 9), alone.load_rows(embedding, 3, 9))
    assert whole.notes == ("only the text model is exported: 2 tensors of other parts are left out",)


def test_what_is_not_known_to_be_for_images_is_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "alone", QWEN3_5)
    directory = wrapped(tmp_path / "whole", tmp_path / "alone", tie_word_embeddings=False)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.language_model.layers.0.linear_attn.extra.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"no place for model\.layers\.0\.linear_attn\.extra"):
        read_model(open_checkpoint(directory))


def test_a_text_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "alone", QWEN3_5)
    with pytest.raises(InvalidCheckpoint, match=r"text_config must be an object, got \[1\]"):
        open_checkpoint(wrapped(tmp_path / "whole", tmp_path / "alone", text_config=[1]))
