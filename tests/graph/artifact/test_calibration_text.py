"""Calibration text is private: it is in no artifact and no bundle unless asked, and a later export reads it again."""

import json
import tarfile
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from deploy import bundle
from export.quantize.int8.saved import load_calibration
from headrace import main
from runtime.artifact.manifest import CALIBRATION, CALIBRATION_ARRAYS, RECEIPT, open_artifact
from tests.support.byte_tokenizer import byte_level_hf, write_byte_tokenizer
from tests.support.tiny.artifact import write_listed
from tests.support.tiny.checkpoint import config_of, write_checkpoint

SECRET = "the combination is 3141"
SMALL = ["--precision", "w8a8", "--calibration-samples", "6", "--calibration-length", "48", "--force"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a private text, and two artifacts calibrated on it, one of which keeps it."""
    root = tmp_path_factory.mktemp("secret-place")
    model = write_checkpoint(root / "model", config_of("llama", num_hidden_layers=1))
    write_byte_tokenizer(model)
    lines = (json.dumps({"text": f"{SECRET}, and so on, in line {number}."}) for number in range(200))
    (root / "secret.jsonl").write_text("\n".join(lines))
    for name, flags in (("artifact", []), ("kept", ["--keep-calibration-text"])):
        command = [
            "export",
            str(model),
            "--out",
            str(root / name),
            *SMALL,
            "--calibration-text",
            str(root / "secret.jsonl"),
            *flags,
        ]
        assert main(command) == 0
    return root


def says(artifact: Path) -> str:
    """All that an artifact says to who looks into it: its texts, and token ids of every array of integers as text."""
    texts = [file.read_text() for file in artifact.iterdir() if file.suffix in (".json", ".jinja")]
    if (artifact / CALIBRATION_ARRAYS).is_file():
        with np.load(artifact / CALIBRATION_ARRAYS) as arrays:
            for name in arrays.files:
                if arrays[name].dtype.kind in "iu" and arrays[name].size and arrays[name].max() < 320:
                    texts.append(byte_level_hf().decode(arrays[name].ravel().tolist()))
    return "\n".join(texts)


def test_neither_text_nor_path_is_in_an_artifact(root: Path) -> None:
    said = says(root / "artifact")
    assert SECRET not in said and str(root) not in said and "secret.jsonl" in said
    kept = says(root / "kept")
    assert SECRET in kept and str(root) not in kept


def packed(artifact: Path, out: Path, **options: Any) -> Path:
    def write_wheel(target: Path) -> None:
        target.mkdir()

    path = bundle.make_bundle(
        open_artifact(artifact, allow_failed=True), "cpu", out, write_wheel=write_wheel, **options
    )
    with tarfile.open(path) as archive:
        archive.extractall(out, filter="data")
    return out / str(path.name).removesuffix(".tar.gz") / "artifact"


def test_nor_in_a_bundle_even_of_an_artifact_that_keeps_it(root: Path, tmp_path: Path) -> None:
    inside = packed(root / "kept", tmp_path / "plain")
    assert SECRET not in says(inside) and not (inside / CALIBRATION).exists()
    assert open_artifact(inside, allow_failed=True).manifest.files.keys() == open_artifact(
        root / "kept", allow_failed=True
    ).manifest.files.keys() - {CALIBRATION, CALIBRATION_ARRAYS}
    assert SECRET in says(packed(root / "kept", tmp_path / "asked", keeps_calibration=True))


def test_a_bundle_leaves_out_the_path_that_an_early_receipt_has(root: Path, tmp_path: Path) -> None:
    artifact = copytree(root / "artifact", tmp_path / "old")
    receipt = json.loads((artifact / RECEIPT).read_text())
    receipt["quantization"]["calibration"]["source"] = "/home/me/secret.jsonl"
    receipt["kv_calibration"] = {"source": "~/secret.jsonl"}
    write_listed(artifact, RECEIPT, json.dumps(receipt).encode())
    said = says(packed(artifact, tmp_path / "dist"))
    assert "/home/me" not in said and "~/" not in said and "secret.jsonl" in said


def test_a_calibration_without_its_text_is_used_again_with_the_text_at_hand(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(root / "model"), "--out", str(tmp_path / "again"), "--force", "--precision", "w8a8"]
    command += ["--reuse-calibration", str(root / "artifact")]
    assert main(command) == 2
    assert (
        "holds no text, and this export needs it: give --calibration-text secret.jsonl as well"
        in capsys.readouterr().err
    )
    other = tmp_path / "other.txt"
    other.write_text("something else altogether, at length. " * 200)
    assert main([*command, "--calibration-text", str(other)]) == 2
    assert "is not the text that --reuse-calibration" in capsys.readouterr().err
    assert main([*command, "--calibration-text", str(root / "secret.jsonl")]) == 0
    for name in ("model.onnx", "weights.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (root / "artifact" / name).read_bytes()
    command[-1] = str(root / "kept")
    command[3] = str(tmp_path / "from-kept")
    assert main(command) == 0
    assert (tmp_path / "from-kept" / "weights.bin").read_bytes() == (root / "artifact" / "weights.bin").read_bytes()


def test_the_projects_own_text_is_found_again_by_itself(root: Path, tmp_path: Path) -> None:
    first, second = (["export", str(root / "model"), "--out", str(tmp_path / name), "--force"] for name in ("a", "b"))
    assert main([*first, *SMALL, "--calibration-text", "built-in"]) == 0
    assert main([*second, "--precision", "w4a16", "--calibration", str(tmp_path / "a")]) == 0
    account = json.loads((tmp_path / "b" / CALIBRATION).read_text())["provenance"]
    assert account["source"] == "built-in" and account["num_samples"] == 6


def test_self_samples_the_text_from_the_model_at_hand(root: Path, tmp_path: Path) -> None:
    command = ["export", str(root / "model"), "--out", str(tmp_path / "self"), *SMALL, "--keep-calibration"]
    assert main([*command, "--calib", "self"]) == 0
    calibration = load_calibration(tmp_path / "self", vocab_size=320)
    assert [len(ids) for ids in calibration.sequences] == [48] * 6
    assert len({tuple(ids) for ids in calibration.sequences}) == 6
    assert calibration.provenance["source"] == "self"
    assert not (tmp_path / "self" / "sampler").exists(), "the model that was sampled from is gone"
