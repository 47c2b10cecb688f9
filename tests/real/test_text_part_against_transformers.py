"""The text model cut out of a model of text and images gives the logits that the whole gives on text."""

from pathlib import Path

import numpy as np
import pytest

from export.model.checks.model_reading import read_model
from export.model.families.architectures import as_described
from export.model.reference.forward import run_reference
from export.sources.open import open_checkpoint
from tests.support.session_runs import LOGIT_TOLERANCE
from tests.support.tiny.hybrids import QWEN3_5

pytestmark = pytest.mark.oracle


def test_qwen3_5_on_text(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(
        text_config={**QWEN3_5, "rope_parameters": rope},
        vision_config={**vision, "num_position_embeddings": 16},
        tie_word_embeddings=True,
    )
    written = transformers.Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = np.random.default_rng(1).integers(3, 250, 60)
    with torch.no_grad():
        for weights in written.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 1 / weights.shape[-1] ** 0.5)
            else:
                weights.add_(torch.randn_like(weights) * 0.1)
        logits = written(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    written.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config = read_model(checkpoint)
    states = run_reference(as_described(checkpoint), config, [ids.tolist()])
    assert np.abs(states.logits(0, 0, len(ids)) - logits).max() < LOGIT_TOLERANCE
