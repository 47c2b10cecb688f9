"""`headrace fit`: the server's own sums, and estimates near what other exports take."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.artifact.manifest import TRT_WEIGHTS, WEIGHTS, Artifact
from runtime.commands.fit import CONTEXTS, main, rows
from runtime.errors import InvalidSetting
from runtime.machine.memory import FREE_FRACTION, plan_slots
from tests.support.simulated.session import export_tiny, write_plan_files

MEMORY = 20_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_tiny(tmp_path_factory.mktemp("tiny"), precision="fp16")


def test_the_artifacts_own_row_is_what_the_server_would_do(tiny: Artifact) -> None:
    ort = rows(tiny, MEMORY, 32)[0]
    assert (ort.runtime, ort.precision, ort.is_estimate) == ("ort", "fp16", False)
    assert ort.weight_bytes == tiny.manifest.files[WEIGHTS].size
    assert ort.token_bytes == 2 * 3 * 2 * 16 * 2
    assert ort.kv_budget == int((MEMORY - ort.weight_bytes - 32 * 320 * 4) * FREE_FRACTION)
    for length, count in ort.slots.items():
        assert count == plan_slots(max_batch=32, capacity=length, bytes_per_token=ort.token_bytes, budget=ort.kv_budget)
    assert list(ort.slots) == [256], "the model's own limit, below every usual length"
    assert min(CONTEXTS) > 256


@pytest.mark.parametrize(
    ("dialect", "precision"), [("ort", "fp32"), ("ort", "w8a16"), ("ort", "w4a16"), ("trt", "w4a16")]
)
def test_estimates_are_near_what_the_export_takes(tmp_path: Path, dialect: str, precision: str) -> None:
    """Within a twentieth: norms, rotary tables and padding between tensors are not counted."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2048}
    artifact = export_tiny(tmp_path / precision, precision=precision, dialects=(dialect,), **sizes)
    other = export_tiny(tmp_path / "other", precision="fp16", dialects=(dialect,), **sizes)
    (row,) = (row for row in rows(other, MEMORY, 8) if (row.runtime, row.precision) == (dialect, precision))
    assert row.is_estimate
    file = WEIGHTS if dialect == "ort" else TRT_WEIGHTS
    assert row.weight_bytes == pytest.approx(artifact.manifest.files[file].size, rel=0.05)
    assert row.kv_dtype == artifact.manifest.kv_of(dialect).dtype


def test_an_engine_that_was_built_is_counted(tmp_path: Path) -> None:
    artifact = export_tiny(tmp_path, precision="fp16")
    plan = write_plan_files(artifact)
    (row,) = (row for row in rows(artifact, MEMORY, 8) if row.runtime == "trt" and not row.is_estimate)
    assert row.weight_bytes == plan.stat().st_size and row.kv_dtype == "float16"


def test_the_table_the_flags_and_the_json(tiny: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny.path), "--memory", "20MB", "--max-batch", "4"]) == 0
    text = capsys.readouterr().out
    assert "fits: fp16 on ort, --max-len 256 --max-batch 4 --kv-memory" in text
    assert "for KV = (memory - weights - logits) x 0.6" in text
    assert main([str(tiny.path), "--memory", "20MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(row["runtime"], row["precision"]) for row in found["rows"]} >= {("ort", "w4a16"), ("trt", "w8a8")}
    assert all(row["fits"] for row in found["rows"])


def test_what_does_not_fit_is_said_with_the_sums(tiny: Artifact) -> None:
    with pytest.raises(InvalidSetting, match=r"does not fit 50\.0 kB in any precision: .* of weights and .* of logits"):
        main([str(tiny.path), "--memory", "50kB"])
