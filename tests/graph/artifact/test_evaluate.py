"""`headrace eval` and `headrace inspect` on tiny artifacts: figures against an independent sum, and bad input."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.model.families.architectures import parse_config
from export.model.reference.forward import run_reference
from export.pipeline.export_model import ExportOptions, export_model
from headrace import main
from runtime.artifact.manifest import open_artifact
from runtime.commands.inspect_artifact import num_parameters
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny.artifact import TinyExports
from tests.support.tiny.checkpoint import config_of, shapes_of, write_checkpoint

TEXT = "Ten small boats,\nneuf à voiles, et une sans.\n" * 9


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same checkpoint in a precision, exported once."""
    root = tmp_path_factory.mktemp("eval")
    source = write_checkpoint(root / "checkpoint", config_of("llama-tied"))
    write_byte_tokenizer(source)
    (root / "text.txt").write_text(TEXT)

    def artifact(precision: str) -> Path:
        out = root / precision
        if not out.exists():
            export_model(ExportOptions(model=str(source), out=out, precision=precision, force=True))
        return out

    return artifact


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def test_perplexity_is_what_the_reference_says(exported: Callable[[str], Path], capsys: Any) -> None:
    artifact = exported("fp32")
    text = artifact.parent / "text.txt"
    result = run_json(capsys, "eval", str(artifact), "--text", str(text), "--window", "50")
    ids = Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(TEXT).ids
    windows = [ids[start : start + 50] for start in range(0, len(ids), 50)]
    checkpoint = SafetensorsCheckpoint(artifact.parent / "checkpoint")
    states = run_reference(checkpoint, parse_config(checkpoint.config), windows)
    nll = []
    for idx, window in enumerate(windows):
        logits = states.logits(idx, 0, len(window) - 1).astype(np.float64)
        for row, token in zip(logits, window[1:], strict=True):
            nll.append(math.log(np.exp(row).sum()) - row[token])
    assert result["tokens"] == len(nll) == len(ids) - len(windows)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_an_artifact_is_no_distance_from_itself_and_some_from_another(
    exported: Callable[[str], Path], capsys: Any
) -> None:
    fp32, w8a16 = exported("fp32"), exported("w8a16")
    common = ["--text", str(fp32.parent / "text.txt"), "--window", "64", "--allow-failed"]
    same = run_json(capsys, "eval", str(fp32), "--against", str(fp32), *common)
    assert (same["kl"], same["max_logit_error"], same["top1_agreement"]) == (pytest.approx(0, abs=1e-7), 0, 1)
    other = run_json(capsys, "eval", str(w8a16), "--against", str(fp32), *common)
    assert other["kl"] > 1e-6 and other["max_logit_error"] > 1e-3
    assert other["perplexity_increase"] == pytest.approx(other["perplexity"] / other["perplexity_against"] - 1)
    alone = run_json(capsys, "eval", str(w8a16), *common)
    assert alone["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)
    limited = run_json(capsys, "eval", str(fp32), *common, "--limit", "65")
    assert limited["tokens"] == 63


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "cannot be read: No such file"),
        (b"", [], "fewer than two tokens"),
        (b"x", [], "fewer than two tokens"),
        (b"good line\nbad \xff byte", [], "byte 0xff at offset 14"),
        (b"fine text", ["--window", "1"], "2 to 256"),
        (b"fine text", ["--window", "257"], "2 to 256"),
        (b"fine text", ["--limit", "1"], "--limit 1"),
    ],
)
def test_bad_input_is_one_line(
    exported: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    flags: list[str],
    message: str,
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert main(["eval", str(exported("fp32")), "--text", str(text), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_cannot_be_compared_is_refused(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = exported("fp32").parent / "text.txt"
    for changes, message in (({"vocab_size": 400}, "has 400 tokens"), ({}, "no tokenizer.json")):
        source = write_checkpoint(tmp_path / str(len(changes)) / "checkpoint", config_of("llama", **changes))
        if changes:
            write_byte_tokenizer(source)
        other = export_model(ExportOptions(model=str(source), out=tmp_path / str(len(changes)) / "artifact")).path
        assert main(["eval", str(other), "--against", str(exported("fp32")), "--text", str(text)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["llama-tied", "llama", "qwen3", "llama-mqa-wide-heads"])
def test_parameters_are_counted_as_they_are_stored(tiny: TinyExports, variant: str) -> None:
    matrices = sum(math.prod(shape) for shape in shapes_of(config_of(variant)).values() if len(shape) > 1)
    assert num_parameters(tiny.artifact(variant)) == matrices


def test_inspect_shows_every_file_and_check(
    exported: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = open_artifact(exported("w8a16"), allow_failed=True)
    assert main(["inspect", str(artifact.path)]) == 0
    out = capsys.readouterr().out
    for name, entry in artifact.manifest.files.items():
        assert name in out and entry.sha256[:12] in out
    for check in artifact.receipt["checks"]:
        assert check["figure"] in out and check["reason"] in out
    shown = run_json(capsys, "inspect", str(artifact.path))
    assert shown["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert shown["manifest"]["precision"] == "w8a16"
    assert main(["inspect", str(artifact.path.parent)]) == 2
    assert "no manifest.json" in capsys.readouterr().err


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_model_of_nan_is_shown_as_failed_and_stays_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    write_byte_tokenizer(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite itself, unlike every sum of it
    save_file(tensors, source / "model.safetensors")
    artifact = str(export_model(ExportOptions(model=str(source), out=tmp_path / "artifact", force=True)).path)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert main(["eval", artifact, "--text", str(text)]) == 2
    assert "--allow-failed" in capsys.readouterr().err
    common = ["eval", artifact, "--against", artifact, "--text", str(text), "--allow-failed"]
    assert main([*common, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out, parse_constant=refuse_constant)
    assert (figures["perplexity"], figures["kl"], figures["max_logit_error"]) == ("nan", "nan", "nan")
    assert main(common) == 0
    assert "KL(against || this)  nan nats a token" in capsys.readouterr().out
    assert main(["inspect", artifact]) == 0
    assert "FAILED" in capsys.readouterr().out
    assert main(["inspect", artifact, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse_constant)
    assert shown["passed"] is False
    assert shown["kv_bytes_per_slot"] == 256 * shown["kv_bytes_per_token"]
