"""Exported graphs against two references: the numpy decoder, which shares their config parsing, and transformers."""

import numpy as np
import pytest

from export.model.families.table import ARCHITECTURES
from runtime.backends.ort.session import OrtSession
from tests.support.session_runs import LOGIT_TOLERANCE, run_in_pieces, run_ragged
from tests.support.tiny.architectures import BEYOND_LLAMA
from tests.support.tiny.artifact import TinyExports
from tests.support.tiny.checkpoint import VARIANTS


def test_every_architecture_has_a_variant() -> None:
    tiny = (*VARIANTS.values(), *BEYOND_LLAMA.values())
    assert {config["model_type"] for config in tiny} == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_passes_its_gate_against_numpy(tiny: TinyExports, variant: str) -> None:
    artifact = tiny.artifact(variant)
    assert artifact.passed
    assert artifact.receipt["figures"]["max_logit_error"] < LOGIT_TOLERANCE
    assert artifact.receipt["figures"]["greedy_agreement"] == 1


@pytest.mark.parametrize(("precision", "top1"), [("fp16", 0.98), ("w8a16", 0.95)])
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3"])
def test_narrow_precisions_stay_close(tiny: TinyExports, variant: str, precision: str, top1: float) -> None:
    artifact = tiny.artifact(variant, precision)
    assert artifact.receipt["figures"]["top1_agreement"] >= top1
    assert artifact.receipt["figures"]["max_logit_error"] > 0, "rounding must show, or nothing was rounded"


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_equals_transformers(tiny: TinyExports, variant: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.checkpoint(variant), dtype=torch.float32, attn_implementation="eager"
    )
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 320, 120)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids[None])).logits[0].numpy()
    session = OrtSession.open(tiny.artifact(variant), num_slots=8, capacity=128)
    for sizes in ([120], [1] * 120, [50, 1, 33, 36]):
        logits = run_in_pieces(session, ids, sizes)
        assert np.abs(logits - expected).max() < LOGIT_TOLERANCE, f"pieces of {sizes[:4]}"
    cuts = [1, 119, 60, 7, 33, 100, 2, 90]
    heads = run_ragged(session, [ids[:cut] for cut in cuts], [0] * 8)
    tails = run_ragged(session, [ids[cut:] for cut in cuts], cuts)
    for cut, head, tail in zip(cuts, heads, tails, strict=True):
        assert np.abs(head - expected[cut - 1]).max() < LOGIT_TOLERANCE
        assert np.abs(tail - expected[-1]).max() < LOGIT_TOLERANCE
