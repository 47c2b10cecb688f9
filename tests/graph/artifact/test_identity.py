"""Where an export is written, and that it replaces an artifact of its own model and nothing else."""

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
from safetensors.numpy import load_file, save_file

from export.artifact.identity import Identity, check_replaceable, default_name, identity_of
from export.artifact.termination import orderly_end
from export.artifact.writer import staged
from headrace import main
from runtime.artifact.manifest import CHOICE, MANIFEST, open_artifact
from runtime.errors import InvalidSetting
from tests.support.tiny.checkpoint import config_of, write_checkpoint

ROOT = Path(__file__).parents[3]

NAMES = {
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "./x/Model.Q4_K_M.GGUF": "model.q4_k_m",
    "models/model.safetensors": "model",
    "a/phi-1.5/": "phi-1.5",
    "smollm2-135m-instruct": "smollm2-135m-instruct",
    ".": ROOT.name.lower(),
}


@pytest.mark.parametrize("model", NAMES)
def test_the_default_directory_keeps_what_is_behind_a_dot(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert default_name(model) == NAMES[model]
    command = ["make", "--no-print-directory", "--dry-run", "export", f"MODEL={model}", "VENV=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"--out 'artifacts/{NAMES[model]}-" in done.stdout, "make and the command agree"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two models of one name, and one of another; `artifact` is of the first."""
    root = tmp_path_factory.mktemp("identity")
    for seed, name in enumerate(("a/model", "b/model", "other")):
        write_checkpoint(root / name, config_of("llama", num_hidden_layers=1), seed=seed)
    assert main(["export", str(root / "a/model"), "--out", str(root / "artifact")]) == 0
    return root


def fp32_of(model: Path) -> Identity:
    return identity_of(str(model), revision=None, precision="fp32", has_int8_kv=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


@pytest.mark.parametrize("flags", [[], ["--if-missing"]], ids=["export", "if missing"])
@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("other", [], "holds model (fp32), and not other (fp32)"),
        ("a/model", ["--precision", "w8a16"], "holds model (fp32), and not model (w8a16)"),
        ("b/model", [], "holds model (fp32), of the same name from another place"),
        ("a/model", ["--kv", "int8"], "and not model (fp32, int8 KV cache)"),
        ("a/model", ["--precision", "auto"], "and not model (auto)"),
    ],
    ids=["model", "precision", "place", "cache", "auto"],
)
def test_another_models_artifact_stays(
    exported: Path, flags: list[str], model: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(exported / "artifact")
    assert main(["export", str(exported / model), "--out", str(exported / "artifact"), *flags, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.endswith("name another --out, or say --replace to delete it")
    assert contents(exported / "artifact") == before
    assert not [path for path in exported.iterdir() if path.name.startswith(".")]


def test_what_is_there_already_is_known_by_name_place_and_precision(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(exported / "a/model"), "--out", str(exported / "artifact"), "--if-missing"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{exported / 'artifact'} is there already\n"


def test_if_missing_exports_again_if_the_artifact_is_shorter_or_damaged(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copytree(exported / "artifact", tmp_path / "artifact")
    command = ["export", str(exported / "a/model"), "--out", str(out), "--if-missing"]
    assert main([*command, "--max-len", "64"]) == 0
    assert "was exported for 256 tokens: it is exported again" in capsys.readouterr().out
    assert open_artifact(out).manifest.dims.max_len == 64
    (out / "weights.bin").write_bytes(b"")
    assert main(command) == 0
    assert "cannot be used (" in capsys.readouterr().out
    assert open_artifact(out).manifest.dims.max_len == 256


def test_replace_deletes_what_it_is_told_to_and_nothing_that_is_no_artifact(exported: Path, tmp_path: Path) -> None:
    out = copytree(exported / "artifact", tmp_path / "artifact")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InvalidSetting, match=r"also holds notes\.txt, which no export wrote"):
        check_replaceable(out, fp32_of(exported / "a/model"))
    assert main(["export", str(exported / "a/model"), "--out", str(out)]) == 2
    assert main(["export", str(exported / "other"), "--out", str(out), "--replace"]) == 0
    assert open_artifact(out).manifest.source == "other" and not (out / "notes.txt").exists()


@pytest.mark.parametrize(
    "manifest",
    ["{", "[]", '{"name": "a web page", "icons": []}', '{"schema_version": 2}', "[" * 100_000, '{"files": 1e999}'],
    ids=["cut off", "a list", "a web page's", "a part", "nested", "a number"],
)
def test_a_directory_with_some_other_manifest_is_never_deleted(
    exported: Path, tmp_path: Path, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    (tmp_path / "thesis.txt").write_text("words")
    assert main(["export", str(exported / "other"), "--out", str(tmp_path), "--replace"]) == 2
    assert "holds something that is not an artifact" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "words"


def test_an_artifact_of_an_earlier_release_is_still_known(exported: Path, tmp_path: Path) -> None:
    """Its schema cannot be read any more; whose it is can."""
    raw: dict[str, Any] = json.loads((exported / "artifact" / MANIFEST).read_text())
    raw |= {"schema_version": 1, "files": {**raw["files"], CHOICE: {}}}
    del raw["origin"], raw["engines"]
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    auto = identity_of(str(exported / "b/model"), revision=None, precision="auto", has_int8_kv=False)
    present = check_replaceable(tmp_path, auto)
    assert present is not None and present.identity.described == "model (auto)"


def test_a_link_to_the_artifact_stays_a_link(exported: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "disk" / "artifact")
    for _ in range(2):
        assert main(["export", str(exported / "other"), "--out", str(link)]) == 0
        assert link.is_symlink() and open_artifact(link).manifest.source == "other"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["artifact"]


def test_a_revision_is_another_model() -> None:
    main_branch, tagged = (
        identity_of("owner/name", revision=revision, precision="fp32", has_int8_kv=False) for revision in (None, "v2")
    )
    assert not main_branch.is_same(tagged) and tagged.source == "owner/name@v2" and tagged.origin is None


def test_an_export_that_ends_meanwhile_is_not_replaced_either(exported: Path, tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    wanted = fp32_of(exported / "other")
    with (
        pytest.raises(InvalidSetting, match="and not other"),
        staged(target, check=lambda: check_replaceable(target, wanted)) as staging,
    ):
        (staging / MANIFEST).write_text("mine")
        copytree(exported / "artifact", target)
    assert open_artifact(target).manifest.source == "model"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_what_a_killed_swap_set_aside_comes_back(exported: Path, tmp_path: Path) -> None:
    """Killed between its two renames: the old artifact has the hidden name, and there is no other."""
    target = tmp_path / "artifact"
    before = contents(exported / "artifact")
    copytree(exported / "artifact", tmp_path / ".artifact.partial-999999999.old")
    with pytest.raises(RuntimeError), staged(target):
        assert contents(target) == before
        raise RuntimeError
    assert contents(target) == before and [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_staging_directory_that_is_in_use_stays_whatever_its_number(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with staged(target) as first:
        moved = first.with_name(".artifact.partial-999999999")  # as if by a process in another container
        first.rename(moved)
        with pytest.raises(RuntimeError), staged(target):
            assert moved.is_dir()
            raise RuntimeError
        moved.rename(first)
        (first / MANIFEST).write_text("{}")
    assert target.is_dir()


def test_sighup_ends_like_sigterm_unless_it_is_ignored() -> None:
    with pytest.raises(SystemExit, match=str(128 + signal.SIGHUP)), orderly_end():
        os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with orderly_end():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "deep", config_of("llama", num_hidden_layers=24, vocab_size=4000))
    command = [sys.executable, "-m", "headrace", "export", str(model), "--out", str(tmp_path / "artifact")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".artifact.partial-*/weights.bin")):
        assert process.poll() is None and time.monotonic() < deadline, "the export never began"
        time.sleep(0.005)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "ended by SIGTERM"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_failed_gate_leaves_nothing_and_a_forced_one_is_plain_json(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "model", config_of("llama", num_hidden_layers=1))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:, 0] = np.float32(3e38)  # finite itself; its products are not
    save_file(tensors, model / "model.safetensors")
    out = tmp_path / "artifact"
    assert main(["export", str(model), "--out", str(out)]) == 2
    assert "is nan" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert main(["export", str(model), "--out", str(out), "--force"]) == 0
    assert "nan" in capsys.readouterr().out

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    receipt = json.loads((out / "receipt.json").read_text(), parse_constant=refuse)
    assert not receipt["passed"] and not open_artifact(out, allow_failed=True).passed
    assert main(["inspect", str(out), "--json"]) == 0
    assert main(["inspect", str(out)]) == 0


def test_a_gate_that_a_calibrated_model_fails_takes_the_calibration_away(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config_of("llama", num_hidden_layers=1))
    small = ["--precision", "w8a8", "--calibration-samples", "4", "--calibration-length", "32"]
    command = ["export", str(model), "--out", str(tmp_path / "artifact"), *small, "--gate", "kl=-1"]
    assert main(command) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
