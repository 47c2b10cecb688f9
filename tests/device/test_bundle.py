"""The bundle of a device: what is in it, pinned, and refused. `deploy/try_bundle.sh` installs and serves one."""

import importlib.util
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.hashes import with_hashes
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.errors import InvalidSetting
from serve.access.api_keys import read_keys
from tests.support.simulated.session import export_tiny, write_plan_files

DEPLOY = Path(__file__).parents[2] / "deploy"


def load_bundle() -> Any:
    """deploy/ is no package: it is run as a script."""
    spec = importlib.util.spec_from_file_location("bundle", DEPLOY / "bundle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundle = load_bundle()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = export_tiny(tmp_path_factory.mktemp("tiny"))
    write_plan_files(artifact)
    return artifact


def hashed(lines: Sequence[str], *, platform: str, python: str, is_closed: bool) -> str:
    """What uv writes, without asking the package index."""
    assert platform.partition("-")[0] in ("x86_64", "aarch64") and python.startswith("3.")
    return "".join(f"{line} \\\n    --hash=sha256:{'0' * 64}\n" for line in lines)


def unpacked(artifact: Artifact, device: str, directory: Path) -> Path:
    """Make a bundle, without the half minute that building a real wheel takes, and unpack it."""

    def write_wheel(target: Path) -> None:
        target.mkdir()
        (target / "headrace-0-py3-none-any.whl").write_bytes(b"")

    path = bundle.make_bundle(artifact, device, directory, write_wheel=write_wheel, hashed=hashed)
    checksum = path.with_name(f"{path.name}.sha256")
    assert {file.name for file in directory.iterdir()} == {path.name, checksum.name}
    subprocess.run(["sha256sum", "--check", "--quiet", checksum.name], cwd=directory, check=True)
    with tarfile.open(path) as archive:
        archive.extractall(directory, filter="data")
    return directory / str(path.name).removesuffix(".tar.gz")


def test_the_bundle_of_a_cpu_is_whole(tiny: Artifact, tmp_path: Path) -> None:
    root = unpacked(tiny, "cpu", tmp_path)
    assert open_artifact(root / "artifact").manifest == tiny.manifest, "every hash is right"
    assert not (root / "artifact" / "engines").exists(), "no use for them here"
    names = {file.name for file in root.iterdir()}
    assert names >= {"start.sh", "headrace.env", "headrace.service", "Dockerfile", "README.md", "requirements.txt"}
    assert (root / "start.sh").stat().st_mode & 0o100
    assert (root / "Dockerfile").read_text().count("FROM python:3.11-slim-bookworm\n") == 1
    pinned = (root / "requirements.txt").read_text().splitlines()[::2]
    assert all("==" in line for line in pinned)
    assert (root / "device.txt").read_text() == ""
    assert {"onnxruntime", "flask", "tokenizers", "werkzeug"} <= {line.partition("==")[0] for line in pinned}
    assert "DEVICE=cpu" in (root / "headrace.env").read_text().splitlines()


def test_the_bundle_of_an_rtx_takes_its_engines_and_packages(tiny: Artifact, tmp_path: Path) -> None:
    root = unpacked(tiny, "rtx", tmp_path)
    assert len(list((root / "artifact" / "engines").iterdir())) == 2
    text = (root / "device.txt").read_text()
    assert "--hash" in text and "tensorrt-rtx==" in text and "cuda-python==" in text
    settings = dict(
        line.split("=", 1) for line in (root / "headrace.env").read_text().splitlines() if not line.startswith("#")
    )
    assert (settings["DEVICE"], settings["ENGINE_TARGET"], settings["VENV_FLAGS"]) == ("tensorrt", "tensorrt-rtx", "")


def test_a_jetson_orin_takes_the_plain_graph_and_the_systems_tensorrt(tiny: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"has no standard-21 graph.*--dialect ort,standard-21"):
        bundle.make_bundle(tiny, "jetson-orin", tmp_path)
    assert "VENV_FLAGS=--system-site-packages" in bundle.environment(bundle.STACKS["jetson-orin"])
    assert not any(line.startswith("tensorrt") for line in bundle.STACKS["jetson-orin"].extra)


def test_hashes_are_of_every_file_of_a_release() -> None:
    """Asks the package index, as the installation of these tests did."""
    text = with_hashes(["markupsafe==3.0.4"], platform="aarch64-manylinux_2_39", python="3.12", is_closed=True)
    assert text.startswith("markupsafe==3.0.4 ") and text.count("--hash=sha256:") > 50
    assert with_hashes([], platform="x86_64-manylinux_2_39", python="3.12", is_closed=True) == ""
    with pytest.raises(InvalidSetting, match="no hashes of the packages") as caught:
        with_hashes(["markupsafe==0.0.4"], platform="x86_64-manylinux_2_39", python="3.12", is_closed=True)
    assert "\n" not in str(caught.value)


def test_the_image_and_the_unit_give_away_no_more_than_they_need() -> None:
    image = (DEPLOY / "Dockerfile.in").read_text()
    assert "\nUSER headrace\n" in image and "\nHEALTHCHECK " in image and "API_KEYS=/etc/headrace" in image
    unit = (DEPLOY / "headrace.service").read_text().splitlines()
    assert "User=headrace" in unit and "ExecReload=/bin/kill -HUP $MAINPID" in unit
    assert not any(line.startswith("ReadWritePaths") for line in unit)
    assert "--exit-on-failure" in (DEPLOY / "start.sh").read_text()


def test_start_makes_keys(tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text((DEPLOY / "start.sh").read_text())
    (tmp_path / "headrace.env").write_text(f"DEVICE=cpu\nAPI_KEYS={tmp_path}/keys\n")
    program = tmp_path / ".venv" / "bin" / "headrace"
    program.parent.mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").touch()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {DEPLOY.parent / "headrace.py"} "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "start.sh", "key", "alice", "--priority", "-3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("hr-")
    assert [key.priority for key in read_keys(tmp_path / "keys")] == [-3]


def test_an_unknown_device(tiny: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="DEVICE 'nano' is unknown; choose one of cpu, rtx, jetson-thor"):
        bundle.make_bundle(tiny, "nano", tmp_path)


@pytest.mark.parametrize("script", ["start.sh", "try_bundle.sh"])
def test_the_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / script)], check=True)


def test_start_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text((DEPLOY / "start.sh").read_text())
    (tmp_path / "headrace.env").write_text("DEVICE=cpu\nPYTHON=false\n")
    done = subprocess.run(["bash", "start.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Headrace needs Python 3.11 or newer" in done.stdout


def test_deploy_says_what_was_tested() -> None:
    text = (DEPLOY / "README.md").read_text()
    for device in bundle.STACKS:
        assert f"`{device}`" in text
    for jetpack in ("JetPack 5", "JetPack 6", "JetPack 7"):
        assert jetpack in text
    assert "not run" in text
