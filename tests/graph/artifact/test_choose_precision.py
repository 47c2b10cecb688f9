"""PRECISION=auto: the fastest that passes is kept, and the table says why.

The measuring function is handed in, so the speeds are whatever a test wants them to be.
"""

import json
from pathlib import Path

import pytest

from export.pipeline.auto_precision import ROUNDS, WORKLOADS, candidate_precisions, export_fastest
from export.pipeline.export_model import ExportOptions
from export.pipeline.speed import Speed, Workload, measure_speed
from export.schemes.registry import SCHEMES
from headrace import main
from runtime.artifact.choice import choice_lines, read_choice
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.commands.inspect_artifact import as_json, as_lines
from runtime.errors import GateFailed, InvalidSetting
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.checkpoint import config_of, write_checkpoint
from tests.support.tiny.quantized import Packing, write_quantized


class Stopwatch:
    """Says what it was told about each precision, 99 seconds of any other, and keeps what it was asked."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[tuple[str, Workload]] = []

    def __call__(self, artifact: Artifact, work: Workload) -> Speed:
        self.asked.append((artifact.path.name, work))
        return Speed(self.seconds.get(artifact.path.name, 99.0) * len(self.asked), 0.001)


def options_of(directory: Path, **changes: int) -> ExportOptions:
    write_checkpoint(directory / "model", config_of("llama-tied", **changes))
    out = directory / "out"
    return ExportOptions(model=str(directory / "model"), out=out, precision="auto", quantization=FEW_IDS)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The fastest for one request at a time, w8a16."""
    watch = Stopwatch(fp32=1.0, w8a16=0.5, w4a16=2.0)
    return export_fastest(options_of(tmp_path_factory.mktemp("chosen")), "latency", measure=watch)


def test_the_fastest_that_passes_becomes_the_artifact(chosen: Artifact) -> None:
    assert chosen.manifest.precision == "w8a16"
    assert open_artifact(chosen.path).manifest == chosen.manifest
    assert sorted(path.name for path in chosen.path.parent.iterdir()) == ["model", "out"]
    assert not (chosen.path / "candidates").exists()
    choice = read_choice(chosen)
    assert choice is not None
    assert choice["chosen"] == choice["candidates"][0]["precision"] == "w8a16"
    assert choice["candidates"][0]["seconds"] < choice["candidates"][1]["seconds"]
    assert {row["precision"] for row in choice["candidates"]} == set(candidate_precisions(None))


def test_candidates_are_measured_in_turn_at_the_profiles_work(tmp_path: Path) -> None:
    watch = Stopwatch(fp32=1.0, w8a16=0.5, w4a16=2.0)
    export_fastest(options_of(tmp_path), "throughput", measure=watch)
    names = [name for name, _ in watch.asked]
    once = names[: len(names) // ROUNDS]
    assert len(set(once)) == len(once)
    assert names == once * ROUNDS
    # The tiny model holds 256 tokens: half of them prompt, the rest answer.
    assert {work for _, work in watch.asked} == {Workload(rows=32, prompt_len=128, new_tokens=128)}
    assert WORKLOADS["latency"].fitted(256) == Workload(rows=1, prompt_len=128, new_tokens=128)
    assert WORKLOADS["latency"].fitted(4096) == WORKLOADS["latency"]


def test_one_that_fails_its_gate_is_out_however_fast(tmp_path: Path) -> None:
    # Rows of 100 cannot be cut into blocks of 32: only float32 remains.
    watch = Stopwatch(fp32=9.0)
    artifact = export_fastest(options_of(tmp_path, intermediate_size=100), "latency", measure=watch)
    assert artifact.manifest.precision == "fp32"
    choice = read_choice(artifact)
    assert choice is not None
    out = {row["precision"]: row for row in choice["candidates"] if row["why_not"]}
    assert {"w8a16", "w4a16"} <= set(out)
    assert "not a multiple of the quantization block 32" in out["w8a16"]["why_not"]
    text = "\n".join(choice_lines(choice))
    assert "w8a16       ruled out: model.layers.0.mlp.down_proj.weight has rows of 100" in text


def test_if_none_passes_every_reason_is_told_and_the_old_artifact_stays(tmp_path: Path) -> None:
    options = options_of(tmp_path, intermediate_size=100)
    export_fastest(options, "latency", measure=Stopwatch(fp32=1.0))
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    # Logits a thousand times wider: float32's own noise is then beyond its absolute limit.
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] *= 5e4
    save_file(tensors, file)
    with pytest.raises(GateFailed, match=r"no precision passes: fp32: .*max_logit_error.*; w8a16: "):
        export_fastest(options, "latency", measure=Stopwatch())
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_quantized_checkpoint_can_stay_as_it_is(tmp_path: Path) -> None:
    config = config_of("llama", hidden_size=128, intermediate_size=256)
    write_quantized(tmp_path / "model", config, Packing(method="awq"))
    options = ExportOptions(model=str(tmp_path / "model"), out=tmp_path / "out", precision="auto")
    watch = Stopwatch(fp32=3.0, w4a16=2.0, imported=1.0)
    choice = read_choice(export_fastest(options, "latency", measure=watch))
    assert choice is not None
    assert choice["chosen"] == "imported"
    rows = {row["precision"]: row for row in choice["candidates"]}
    assert list(rows)[:3] == ["imported", "w4a16", "fp32"]
    assert "would round them once more" in rows["w8a16"]["why_not"]


def test_inspect_shows_the_table(chosen: Artifact) -> None:
    lines = list(as_lines(chosen))
    (row,) = [line for line in lines if line.endswith("chosen")]
    assert row.split()[0] == "w8a16"
    assert any(line.startswith("chosen for latency: one request at a time, 128 tokens of prompt") for line in lines)
    assert json.loads(json.dumps(as_json(chosen)))["choice"]["chosen"] == "w8a16"


def test_measuring_a_real_session_gives_times(chosen: Artifact) -> None:
    speed = measure_speed(chosen, Workload(rows=3, prompt_len=20, new_tokens=5))
    assert speed.prefill_s > 0
    assert speed.step_s > 0
    assert speed.seconds(Workload(rows=3, prompt_len=20, new_tokens=5)) == pytest.approx(
        3 * speed.prefill_s + 5 * speed.step_s
    )


def test_every_precision_but_that_for_gpus_is_a_candidate() -> None:
    assert candidate_precisions(None) == [name for name in SCHEMES if name not in ("fp16", "bf16")]
    assert candidate_precisions(4)[-1] == "imported"


def test_flags_that_contradict_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nothing", "--precision", "fp32", "--optimize-for", "latency"]) == 2
    assert "--optimize-for is for --precision auto; fp32 is chosen already" in capsys.readouterr().err
    with pytest.raises(InvalidSetting, match="--force contradicts"):
        export_fastest(ExportOptions(model="x", out=tmp_path, force=True), "latency")


def test_the_command_line_chooses_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "model", config_of("llama-tied"))
    flags = ["--precision", "auto", "--calib-samples", "8", "--calib-length", "64"]
    assert main(["export", str(model), "--out", str(tmp_path / "out"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "chosen for latency: one request at a time" in printed
    assert open_artifact(tmp_path / "out").manifest.precision in printed
