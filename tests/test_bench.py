"""`headrace bench`: every figure is there and makes sense; the roofline's counts against sums done by hand."""

import json
import math
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from export.pipeline import ExportOptions, export_model
from headrace import main
from runtime.artifact import WEIGHTS, Artifact
from runtime.bench import StepTimes, fill_cache, interleaved
from runtime.ort_session import OrtSession
from runtime.roofline import decode_cost
from tests.test_evaluate import byte_level_tokenizer
from tests.tiny_checkpoint import config_of, write_checkpoint


def exported(tmp_path: Path, variant: str) -> Artifact:
    source = write_checkpoint(tmp_path / variant, config_of(variant))
    byte_level_tokenizer(source)
    return export_model(ExportOptions(model=str(source), out=tmp_path / f"{variant}-artifact"))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_the_json_line_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = exported(tmp_path, "llama-tied")
    flags = ["--batch", "1,3", "--prompt", "8,20", "--new-tokens", "4", "--repeat", "2"]
    assert main(["bench", str(artifact.path), *flags]) == 0
    table, line, end = capsys.readouterr().out.rpartition('{"benchmark"')
    result = json.loads(line + end)
    assert "decode x3" in table and "peak memory" in table
    assert [row["tokens"] for row in result["prefill"]] == [8, 20]
    assert [row["batch"] for row in result["decode"]] == [1, 3]
    assert {"tokens_per_s", "ttft_ms", "tpot_ms", "overhead_share"} <= set(result["engine"])
    assert 0 <= result["engine"]["overhead_share"] < 1
    assert result["versions"]["onnxruntime"] == onnxruntime.__version__
    found = numbers(result)
    assert len(found) > 20 and all(math.isfinite(number) and number >= 0 for number in found)


@pytest.mark.parametrize("variant", ["llama-tied", "llama"])
def test_decode_cost_is_what_a_step_reads(tmp_path: Path, variant: str) -> None:
    artifact = exported(tmp_path, variant)
    cost = decode_cost(artifact, batch=5, context=10)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    used, stored = 3 * layer + 320 * 64, 3 * layer + (1 if variant == "llama-tied" else 2) * 320 * 64
    assert cost.kv_bytes == 5 * 10 * (2 * 3 * 2 * 16 * 4)
    assert cost.flop == 5 * (2 * used + 4 * 3 * 4 * 16 * 10)
    size = artifact.manifest.files[WEIGHTS].size
    assert cost.weight_bytes == size * used // stored


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens", "1"], "--new-tokens 1"),
        (["--repeat", "0"], "--repeat 0"),
        (["--threads", "0"], "--threads 0"),
        (["--prompt", "257"], "exported for 256"),
        (["--new-tokens", "250"], "exported for 256"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    artifact = exported(tmp_path, "llama")
    assert main(["bench", str(artifact.path), "--prompt", "8", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--batch", "many"]])
def test_a_bad_list_is_refused(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", str(tmp_path), *flags])
    assert end.value.code == 2


def test_an_artifact_without_a_tokenizer_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    artifact = export_model(ExportOptions(model=str(source), out=tmp_path / "artifact"))
    assert main(["bench", str(artifact.path)]) == 2
    error = capsys.readouterr().err
    assert "has no tokenizer.json" in error and error.count("\n") == 1


def test_runs_are_taken_in_turn_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    values = {"a": iter([100.0, 1.0, 3.0, 2.0]), "b": iter([100.0, 6.0, 5.0, 4.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(values[name])

    assert interleaved([lambda: run("a"), lambda: run("b")], 3) == [2.0, 5.0]
    assert "".join(order) == "abababab"


def test_overhead_counts_only_full_decode_steps() -> None:
    times = StepTimes()
    assert times.overhead_share(2) is None
    times.on_step(num_decode=2, num_prefill_tokens=0, step_s=1.0, model_s=0.75)
    times.on_step(num_decode=1, num_prefill_tokens=0, step_s=1.0, model_s=0.0)
    times.on_step(num_decode=2, num_prefill_tokens=9, step_s=1.0, model_s=0.0)
    assert times.overhead_share(2) == 0.25


def test_filling_the_cache_reaches_every_slot(tmp_path: Path) -> None:
    session = OrtSession.open(exported(tmp_path, "llama"), num_slots=3, capacity=16)
    fill_cache(session, 8)
    for pool in session._pool:
        assert pool[:, :, :8].any(axis=(1, 2, 3)).all() and (pool[1:, :, :8] == pool[0, :, :8]).all()
