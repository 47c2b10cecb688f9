"""What can go wrong in a calibrated export: one line, the right exit code, the earlier artifact as it was.

The earlier artifact is compared byte for byte; so are the names around it, but for the work an interrupted calibration
keeps to go on with.
"""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.pipeline.calibrated import remove_workdir, workdir_of
from export.pipeline.export_model import ExportOptions, export_model
from headrace import main
from runtime.artifact.manifest import open_artifact
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny.checkpoint import config_of, write_checkpoint

SMALL = ["--precision", "w8a8", "--calibration-samples", "8", "--calibration-length", "64", "--force", "--replace"]


def checkpoint_at(directory: Path, **changes: Any) -> Path:
    """A tiny model with a tokenizer."""
    write_checkpoint(directory, config_of("llama", **changes))
    write_byte_tokenizer(directory)
    return directory


def contents(directory: Path) -> Mapping[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and an artifact of it."""
    root = tmp_path_factory.mktemp("bad-input")
    export_model(ExportOptions(model=str(checkpoint_at(root / "model")), out=root / "artifact"))
    return root


def fails(capsys: pytest.CaptureFixture[str], exported: Path, model: Path, *flags: str) -> str:
    """The one line that an export over the earlier artifact ends with, without a trace on the disk."""
    before = contents(exported / "artifact")
    status = main(["export", str(model), "--out", str(exported / "artifact"), *SMALL, *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("headrace")]
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("headrace export: "), lines
    assert contents(exported / "artifact") == before
    assert not list(exported.glob(".artifact.partial-*"))
    return lines[0]


def text_file(content: bytes, name: str = "text.txt") -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / name).write_bytes(content)
        return directory / name

    return write


BAD_TEXTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (text_file(b""), "gives 0 tokens, too few to calibrate on"),
    "blank": (text_file(b" \n\n "), "gives 0 tokens, too few to calibrate on"),
    "tiny": (text_file(b"A few words."), "gives 12 tokens, too few to calibrate on"),
    "latin-1": (text_file("Orléans est loin".encode("latin-1") * 99), "not UTF-8: byte 0xe9 at offset 3"),
    "utf-16": (text_file("words and words".encode("utf-16")), "not UTF-8"),
    "binary": (text_file(bytes(range(256)) * 9), "not UTF-8"),
    "broken json": (text_file(b'{"text": "a"}\n{"text', "a.jsonl"), "a.jsonl:2 is not JSON"),
    "not there": (lambda directory: directory / "gone.txt", "gone.txt"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_cannot_be_used(
    case: str, tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, words = BAD_TEXTS[case]
    assert words in fails(capsys, exported, exported / "model", "--calibration-text", str(write(tmp_path)))


def test_samples_longer_than_the_model(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, exported, exported / "model", "--calibration-length", "257")
    assert "--calibration-length 257 is longer than the model's longest sequence, 256 tokens" in line


def test_text_for_a_model_without_a_tokenizer(
    tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "mute", config_of("llama"))
    file = text_file(b"words " * 2000)(tmp_path)
    assert "the checkpoint has no tokenizer.json" in fails(capsys, exported, model, "--calibration-text", str(file))
    assert "257 is longer than" in fails(capsys, exported, model, "--calibration-length", "257")


def broken_at(model: Path, value: float) -> Path:
    """A model one row of whose weights is `value`."""
    checkpoint_at(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = value
    save_file(tensors, model / "model.safetensors")
    return model


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_weights_that_are_not_finite_are_named(
    precision: str, value: float, shown: str, tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, exported, broken_at(tmp_path / "broken", value), "--precision", precision)
    assert f"tensor 'model.layers.1.mlp.up_proj.weight' holds {shown} at [3, 0]" in line


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_activations_that_are_not_finite(
    precision: str, tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, exported, broken_at(tmp_path / "broken", 3e38), "--precision", precision)
    assert "is not finite on the calibration text" in line


def test_memory_that_is_not_there_is_refused_before_a_weight_is_read(
    tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.pipeline.memory_plan.available_memory", lambda: 1_000_000)
    model = broken_at(tmp_path / "huge", np.nan)
    line = fails(capsys, exported, model)
    assert "needs about " in line and " MB are free" in line and "--ignore-memory" in line
    # Told to go on, it finds what is wrong with the weights.
    assert "holds nan" in fails(capsys, exported, model, "--ignore-memory")


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_a_layer_of_zeros_works(precision: str, tmp_path: Path) -> None:
    model = checkpoint_at(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name in ("0.mlp.down_proj", "1.self_attn.v_proj", "2.mlp.up_proj"):
        tensors[f"model.layers.{name}.weight"][:] = 0
    save_file(tensors, model / "model.safetensors")
    assert main(["export", str(model), "--out", str(tmp_path / "artifact"), *SMALL, "--precision", precision]) == 0
    receipt = open_artifact(tmp_path / "artifact", allow_failed=True).receipt
    assert np.isfinite(float(receipt["figures"]["kl"])) and float(receipt["figures"]["kl"]) < 0.5


def limited(exported: Path, most_bytes: int, *flags: str) -> "subprocess.CompletedProcess[str]":
    """An export whose files may not grow beyond this: what a full disk does, at a known place."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", "export", str(exported / "model"), "--out", str(exported / "artifact"),
         *SMALL, *flags],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("most_bytes", "flags", "is_calibrated"),
    [(50_000, ["--calibration-samples", "64"], False), (300_000, [], True)],
    ids=["hidden states", "weights"],
)
def test_a_disk_that_fills_up(exported: Path, most_bytes: int, flags: list[str], *, is_calibrated: bool) -> None:
    before = contents(exported / "artifact")
    remove_workdir(workdir_of(exported / "artifact"))
    done = limited(exported, most_bytes, *flags)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr[-2000:]
    assert last.startswith("headrace export: a file grew beyond what is allowed") and "nothing was changed" in last
    assert "Traceback" not in done.stderr
    assert contents(exported / "artifact") == before
    assert not list(exported.glob(".artifact.partial-*"))
    assert (workdir_of(exported / "artifact") / "rounded").is_dir() is is_calibrated
    assert main(["export", str(exported / "model"), "--out", str(exported / "artifact"), *SMALL, *flags]) == 0


HEEDS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
import headrace
sys.exit(headrace.main())
"""


def test_ctrl_c_in_the_middle(exported: Path, tmp_path: Path) -> None:
    before = contents(exported / "artifact")
    model = checkpoint_at(tmp_path / "deep", num_hidden_layers=24)
    command = [sys.executable, "-c", HEEDS_CTRL_C, "export", str(model), "--out", str(exported / "artifact"), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    state = workdir_of(exported / "artifact") / "state.json"
    deadline = time.monotonic() + 60
    while not state.is_file():
        assert process.poll() is None and time.monotonic() < deadline, "calibration never began"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "headrace export: interrupted"
    assert "Traceback" not in stderr
    assert contents(exported / "artifact") == before
    assert not list(exported.glob(".artifact.partial-*"))
