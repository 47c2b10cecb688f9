"""An artifact is loaded whole and unchanged, or not at all; an export publishes whole, or changes nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

import export.pipeline.export_model
from export.artifact.writer import staged
from export.pipeline.export_model import ExportOptions, export_model
from export.verify.receipt import verify
from runtime.artifact.manifest import MANIFEST, RECEIPT, WEIGHTS, open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.errors import GateFailed, HeadraceError, InvalidArtifact, InvalidSetting
from tests.support.tiny.artifact import TinyExports
from tests.support.tiny.checkpoint import config_of, write_checkpoint


@pytest.fixture
def artifact(tiny: TinyExports, tmp_path: Path) -> Path:
    """An artifact of its own for each test to spoil."""
    return copytree(tiny.artifact("llama-tied").path, tmp_path / "artifact")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_artifact_opens_and_lists_every_file(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert set(opened.manifest.files) == {file.name for file in artifact.iterdir()} - {MANIFEST}
    assert opened.manifest.dims.vocab_size == 320
    assert not [file for file in artifact.parent.iterdir() if file.name.startswith(".")], "staging is left behind"


@pytest.mark.parametrize("name", [WEIGHTS, "model.onnx", RECEIPT])
def test_a_damaged_file_is_named(artifact: Path, name: str) -> None:
    file = artifact / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidArtifact, match=f"{name} has changed"):
        open_artifact(artifact)
    file.write_bytes(data[:-1])
    with pytest.raises(InvalidArtifact, match=f"{name} has .* bytes"):
        open_artifact(artifact)
    file.unlink()
    with pytest.raises(InvalidArtifact, match=f"{name} is missing"):
        open_artifact(artifact)


def test_a_bad_manifest_is_named(artifact: Path) -> None:
    file = artifact / MANIFEST
    good = json.loads(file.read_text())
    bad: list[tuple[str, str]] = [
        ("{", "not JSON"),
        ("[]", "schema version None"),
        (json.dumps({**good, "schema_version": 99}), "schema version 99"),
        (json.dumps({**good, "dims": {}}), "malformed"),
        (json.dumps({**good, "dims": {**good["dims"], "head_dim": 0}}), "head_dim"),
        (json.dumps({**good, "files": {**good["files"], "../x": {"size": 1, "sha256": "0" * 64}}}), "outside"),
    ]
    for text, message in bad:
        file.write_text(text)
        with pytest.raises(InvalidArtifact, match=message):
            open_artifact(artifact)
    file.unlink()
    with pytest.raises(InvalidArtifact, match="half of one"):
        open_artifact(artifact)
    with pytest.raises(InvalidArtifact, match="headrace export"):
        open_artifact(artifact / "nowhere")


def test_a_failed_receipt_needs_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    out = tmp_path / "artifact"
    wrong = np.float32(1.05)

    def spoiled(reference: Any, config: Any, draft: Any, limits: Any) -> dict[str, Any]:
        """The real verification of a graph whose weights were changed after they were written."""
        file = draft.path / WEIGHTS
        data = np.fromfile(file, np.float32)
        (data * wrong).tofile(file)
        return real_verify(reference, config, draft, limits)

    real_verify = verify
    monkeypatch.setattr(export.pipeline.export_model, "verify", spoiled)
    with pytest.raises(GateFailed, match=r"max_logit_error is .*--force"):
        export_model(ExportOptions(model=str(source), out=out))
    assert not out.exists(), "a model that fails its gate is not written"
    forced = export_model(ExportOptions(model=str(source), out=out, force=True))
    assert not forced.passed
    with pytest.raises(InvalidArtifact, match="accuracy gate"):
        open_artifact(out, check_hashes=False)
    assert not open_artifact(out, allow_failed=True, check_hashes=False).passed


def test_a_slot_longer_than_the_export_is_refused(artifact: Path) -> None:
    with pytest.raises(InvalidSetting, match="257 tokens"):
        OrtSession.open(open_artifact(artifact), num_slots=1, capacity=257)


def test_a_corrupt_graph_is_refused_in_one_line(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"not a graph")
    good = json.loads((artifact / MANIFEST).read_text())
    good["files"]["model.onnx"]["size"] = len(b"not a graph")
    (artifact / MANIFEST).write_text(json.dumps(good))
    with pytest.raises(InvalidArtifact, match="cannot load") as caught:
        OrtSession.open(open_artifact(artifact, check_hashes=False), num_slots=1, capacity=16)
    assert "\n" not in str(caught.value)


def test_an_export_that_is_killed_leaves_the_old_artifact_and_nothing_loadable(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    source = write_checkpoint(artifact.parent / "big", config_of("llama", num_hidden_layers=24, vocab_size=4000))
    command = [sys.executable, "-m", "headrace", "export", str(source), "--out", str(artifact), "--replace"]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (partial := list(artifact.parent.glob(".artifact.partial-*"))):
            assert process.poll() is None, "the export ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (artifact / MANIFEST).read_bytes() == before
        open_artifact(artifact)
        for directory in partial:
            with pytest.raises(InvalidArtifact):
                open_artifact(directory)
    subprocess.run(command, check=True, capture_output=True)
    assert not list(artifact.parent.glob(".artifact.partial-*")), "leftovers go with the next export"
    assert open_artifact(artifact).manifest.dims.num_layers == 24


def test_staging_replaces_only_artifacts(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("words")
    with pytest.raises(InvalidSetting, match="not an artifact"), staged(precious):
        pass
    with pytest.raises(InvalidSetting, match="is a file"), staged(precious / "thesis.txt"):
        pass
    assert (precious / "thesis.txt").read_text() == "words"


def test_a_full_disk_is_one_line_and_changes_nothing(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    with pytest.raises(HeadraceError, match="disk is full"), staged(artifact) as directory:
        (directory / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (artifact / MANIFEST).read_bytes() == before
    assert not list(artifact.parent.glob(".artifact.partial-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["CHECKPOINT", "--precision", "imported"], "w8a16"),
        (["CHECKPOINT", "--max-len", "257"], "2 to 256"),
        (["CHECKPOINT", "--max-len", "1"], "2 to 256"),
        (["CHECKPOINT", "--out", "/proc/headrace"], "/proc"),
    ],
)
def test_bad_exports_end_with_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    arguments = [str(source) if argument == "CHECKPOINT" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "export", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.glob("artifacts/*"))


def test_nan_weights_fail_the_gate(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(HeadraceError, match=r"nan|NaN|finite"):
        export_model(ExportOptions(model=str(source), out=tmp_path / "artifact"))
    assert not (tmp_path / "artifact").exists()
