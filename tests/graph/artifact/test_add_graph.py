"""`headrace engine` on an artifact without a TensorRT graph: exported again with one, from its checkpoint."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from export.artifact.writer import file_entry, write_manifest
from export.pipeline.add_graph import add_graph
from headrace import main
from runtime.artifact.choice import read_choice
from runtime.artifact.manifest import CHOICE, MANIFEST, Artifact, Manifest, open_artifact
from runtime.errors import InvalidArtifact, InvalidSetting
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny.checkpoint import config_of, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models" / "tiny", config_of("llama", num_hidden_layers=1))


def exported(model: Path, *flags: str, fails: bool = False) -> Artifact:
    out = model.parent.parent / "artifact"
    assert main(["export", str(model), "--out", str(out), "--dialect", "ort", *flags]) == 0
    return open_artifact(out, allow_failed=fails)


def test_the_graph_comes_and_everything_else_stays_as_it_was(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_byte_tokenizer(model)
    # Earlier names of the flags, which still work.
    small = ["--calib", "built-in", "--calib-samples", "4", "--calib-length", "32", "--keep", "layers.0.down"]
    flags = ["--precision", "w8a8", "--max-len", "128", "--gate", "kl=0.9", "--keep-calibration", "--force", *small]
    before = exported(model, *flags, fails=True)
    added = add_graph(before, "trt", model=str(model))
    assert f"has no standard graph: exporting {model} again, with one" in capsys.readouterr().out
    after = open_artifact(added.path, allow_failed=True)
    assert set(after.manifest.dialects) == {"ort", "trt"}
    assert after.receipt["quantization"]["two_pass"] == before.receipt["quantization"]["two_pass"]
    assert after.manifest.files["weights.bin"] == before.manifest.files["weights.bin"]
    assert after.manifest.files["model.onnx"] == before.manifest.files["model.onnx"]
    sizes = [artifact.manifest.files["calibration.npz"].size for artifact in (before, after)]
    assert sizes[0] == sizes[1], "the text was kept again"
    assert after.manifest.dims == before.manifest.dims
    limits = {check["figure"]: check["limit"] for check in after.receipt["checks"]}
    assert limits["kl"] == limits["trt.kl"] == 0.9


def test_without_the_checkpoint_it_is_one_line_with_the_command(model: Path) -> None:
    artifact = exported(model)
    wanted = (
        r"has no standard graph, and its checkpoint's path is not recorded \(tiny\); give its path with --model, "
        r"or export it with --dialect ort,standard: headrace export PATH/TO/tiny --precision fp32 --dialect "
        r"ort,standard --max-len 256 --out .*artifact --replace$"
    )
    with pytest.raises(InvalidSetting, match=wanted):
        add_graph(artifact, "trt", model=None)


def test_a_relative_path_is_found_where_the_export_was_started(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exported(model)
    monkeypatch.chdir(model.parent)
    assert set(add_graph(artifact, "trt-plain", model=None).manifest.dialects) == {"ort", "trt-plain"}


def test_another_checkpoint_is_not_taken(model: Path, tmp_path: Path) -> None:
    artifact = exported(model)
    namesake = write_checkpoint(tmp_path / "elsewhere" / "tiny", config_of("llama", num_hidden_layers=1), seed=1)
    for other in (str(namesake), str(tmp_path / "nowhere"), "someone/tiny"):
        with pytest.raises(InvalidSetting, match=r"--model .* is not the checkpoint \(tiny\)"):
            add_graph(artifact, "trt", model=other)
    assert open_artifact(artifact.path).manifest == artifact.manifest


def test_an_int8_cache_has_no_graph_for_tensorrt(model: Path) -> None:
    artifact = exported(model, "--kv", "int8", "--calib-samples", "4", "--calib-length", "32", "--force", fails=True)
    with pytest.raises(InvalidArtifact, match="TensorRT does not take its int8 KV cache"):
        add_graph(artifact, "trt", model=str(model))


def test_the_table_of_a_chosen_precision_stays(model: Path) -> None:
    artifact = exported(model)
    row: dict[str, Any] = {"precision": "fp32", "why_not": None, "seconds": 1.0, "prefill_tokens_per_s": 1.0}
    row |= {"decode_tokens_per_s": 1.0, "file_bytes": 1, "perplexity_increase": None}
    choice = {"optimized_for": "latency", "work": "a prompt", "rounds": 3, "chosen": "fp32", "candidates": [row]}
    choice["machine"] = {"cores": 2, "cpu": "a processor", "instruction_sets": "AVX2"}
    (artifact.path / CHOICE).write_text(json.dumps(choice))
    raw = json.loads((artifact.path / MANIFEST).read_text())
    entry = file_entry(artifact.path / CHOICE)
    raw["files"][CHOICE] = {"size": entry.size, "sha256": entry.sha256}
    write_manifest(artifact.path, Manifest.from_json(json.dumps(raw), "here"))
    add_graph(open_artifact(artifact.path), "trt", model=str(model))
    assert read_choice(open_artifact(artifact.path)) == choice


def test_make_names_the_model_only_if_it_was_given() -> None:
    root = Path(__file__).parents[3]
    for given, word in (([], ""), (["MODEL=x/y"], "--model 'x/y'")):
        command = ["make", "--no-print-directory", "--dry-run", "engine", "VENV=/nowhere", "ARTIFACT=a", *given]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        assert ("--model" in done.stdout) is bool(word) and word in done.stdout
