"""Exported graphs against independent references: the numpy decoder for every variant, transformers as the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.model.architectures import ARCHITECTURES
from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.session.session import Batch
from tests.support.tiny_checkpoint import VARIANTS, config_of, write_checkpoint

# float32 sums of a few hundred terms near 1, in another order; a wrong rotation or mask costs whole units.
LOGIT_TOLERANCE = 1e-4


def exported(tmp_path: Path, variant: str, precision: str = "fp32", **changes: Any) -> tuple[Path, Artifact]:
    source = write_checkpoint(tmp_path / "checkpoint", config_of(variant, **changes))
    options = ExportOptions(model=str(source), out=tmp_path / "artifact", precision=precision)
    export_model(options)
    return source, open_artifact(tmp_path / "artifact")


def test_every_architecture_has_a_variant() -> None:
    assert {config["model_type"] for config in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_passes_its_gate_against_numpy(tmp_path: Path, variant: str) -> None:
    _, artifact = exported(tmp_path, variant)
    assert artifact.passed
    assert artifact.receipt["figures"]["max_logit_error"] < LOGIT_TOLERANCE
    assert artifact.receipt["figures"]["greedy_agreement"] == 1


@pytest.mark.parametrize(("precision", "top1"), [("fp16", 0.98), ("w8a16", 0.95)])
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3"])
def test_narrow_precisions_stay_close(tmp_path: Path, variant: str, precision: str, top1: float) -> None:
    _, artifact = exported(tmp_path, variant, precision)
    assert artifact.receipt["figures"]["top1_agreement"] >= top1
    assert artifact.receipt["figures"]["max_logit_error"] > 0, "rounding must show, or nothing was rounded"


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_equals_transformers(tmp_path: Path, variant: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source, artifact = exported(tmp_path, variant)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 320, 120)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids[None])).logits[0].numpy()
    session = OrtSession.open(artifact, num_slots=8, capacity=128)
    for sizes in ([120], [1] * 120, [50, 1, 33, 36]):
        logits = run_in_pieces(session, ids, sizes)
        assert np.abs(logits - expected).max() < LOGIT_TOLERANCE, f"pieces of {sizes[:4]}"
    cuts = [1, 119, 60, 7, 33, 100, 2, 90]
    heads = run_ragged(session, [ids[:cut] for cut in cuts], [0] * 8)
    tails = run_ragged(session, [ids[cut:] for cut in cuts], cuts)
    for cut, head, tail in zip(cuts, heads, tails, strict=True):
        assert np.abs(head - expected[cut - 1]).max() < LOGIT_TOLERANCE
        assert np.abs(tail - expected[-1]).max() < LOGIT_TOLERANCE


def run_in_pieces(session: OrtSession, ids: np.ndarray[Any, Any], sizes: list[int]) -> np.ndarray[Any, Any]:
    """Logits of every position, the sequence fed in pieces to slot 3."""
    done, out = 0, []
    for size in sizes:
        row = ids[None, done : done + size].astype(np.int64)
        out.append(
            session.run(Batch(3, row, np.array([done], np.int32), np.array([size], np.int32), np.arange(size))).copy()
        )
        done += size
    return np.concatenate(out)


def run_ragged(session: OrtSession, rows: list[np.ndarray[Any, Any]], past: list[int]) -> np.ndarray[Any, Any]:
    """Last logits of rows of different lengths in one run; padded only as far as the slots allow."""
    chunk = max(map(len, rows))
    if max(past) + chunk > session.info.capacity:
        return np.concatenate([run_row(session, idx, row, past[idx]) for idx, row in enumerate(rows)])
    ids = np.zeros((len(rows), chunk), np.int64)
    for idx, row in enumerate(rows):
        ids[idx, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    wanted = np.arange(len(rows)) * chunk + lengths - 1
    return session.run(Batch(0, ids, np.array(past, np.int32), lengths, wanted)).copy()


def run_row(session: OrtSession, slot: int, row: np.ndarray[Any, Any], past: int) -> np.ndarray[Any, Any]:
    batch = Batch(
        slot,
        row[None].astype(np.int64),
        np.array([past], np.int32),
        np.array([len(row)], np.int32),
        np.array([len(row) - 1]),
    )
    return session.run(batch).copy()
