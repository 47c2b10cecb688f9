"""GGUF files of llama.cpp's own converter: every architecture's names, orders and settings, by transformers' logits.

The files in tests/support/tiny/recorded/gguf/ come from record_gguf.py beside them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from export.checkpoint.gguf.architectures import ARCHITECTURES as GGUF_ARCHITECTURES
from export.checkpoint.gguf.architectures import MIXTRAL
from export.model.checks.tensors import check_tensors
from export.model.families.architectures import as_described, parse_config
from export.model.families.table import ARCHITECTURES
from export.model.reference.forward import run_reference
from export.sources.open import open_checkpoint
from tests.support.session_runs import LOGIT_TOLERANCE
from tests.support.tiny.recorded.record import HERE, IDS

FILES = sorted(path.parent for path in HERE.glob("gguf/*/*/model.gguf"))


@pytest.mark.parametrize("directory", FILES, ids=lambda path: path.name)
def test_logits_are_those_of_the_original(directory: Path) -> None:
    checkpoint = open_checkpoint(directory / "model.gguf")
    if checkpoint.config["model_type"] not in ARCHITECTURES:
        pytest.skip(f"{checkpoint.config['model_type']} has no row yet")
    config = parse_config(checkpoint.config)
    config = config.for_length(config.max_position_embeddings)
    described = as_described(checkpoint)
    check_tensors(described, config)
    logits = run_reference(described, config, [IDS]).logits(0, 0, len(IDS))
    np.testing.assert_allclose(logits, load_file(directory / "expected.safetensors")["logits"], atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("directory", FILES, ids=lambda path: path.name)
def test_rows_of_a_tensor_are_those_of_the_whole(directory: Path) -> None:
    checkpoint = open_checkpoint(directory / "model.gguf")
    for name, info in checkpoint.tensors.items():
        whole = checkpoint.load(name)
        assert whole.shape == info.shape, name
        np.testing.assert_array_equal(checkpoint.load_rows(name, len(whole) // 2, len(whole)), whole[len(whole) // 2 :])
        if whole.ndim == 2:
            np.testing.assert_array_equal(np.concatenate(list(checkpoint.pieces(name))), whole)


def test_every_architecture_has_a_file() -> None:
    recorded = {json.loads((path / "config.json").read_text())["model_type"] for path in FILES}
    named = {row.model_type for row in (*GGUF_ARCHITECTURES.values(), MIXTRAL)}
    assert named - recorded <= {"qwen2", "qwen3"}, "those two are in tests/real/test_tiny_gguf_against_transformers.py"
