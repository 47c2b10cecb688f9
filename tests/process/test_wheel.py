"""The built wheel, installed in an empty environment away from the sources: it is whole, exports a model, serves it."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.support.server_process import ROOT, ready
from tests.support.tiny.artifact import TinyExports

PACKAGES = ("export", "runtime", "serve", "calibration_data")
WHERE = "import export.cli, runtime.core, serve.app, calibration_data as c, headrace as h; " + (
    "print(export.cli.__file__, runtime.core.__file__, serve.app.__file__, c.__file__, h.__file__, sep='\\n')"
)


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files that git has."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git says which files belong in the wheel, and this is no checkout")
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files alone, with the running environment's setuptools."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", target, source, cwd=target)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. Other packages come from the running one, whose .pth files do not count:
    an editable install of this project is not seen.
    """
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=root)
    (site,) = root.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "running.pth").write_text("\n".join(paths))
    return root


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_wheel_has_every_file_of_the_packages_and_no_other(tracked: list[str], wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    read_here = {f"{package}/README.md" for package in PACKAGES if package != "calibration_data"}
    wanted = {name for name in tracked if name.partition("/")[0] in PACKAGES} - read_here
    assert len(wanted) > 150
    assert found == wanted | {"headrace.py"}


def test_it_exports_and_serves_a_model_without_the_sources(
    environment: Path, tiny: TinyExports, tmp_path: Path
) -> None:
    env, command = clean_environment(), environment / "bin" / "headrace"
    where = run(environment / "bin" / "python", "-c", WHERE, cwd=tmp_path, env=env).splitlines()
    assert len(where) == 5 and all(Path(file).is_relative_to(environment) for file in where), where
    model = tiny.checkpoint("llama", has_tokenizer=True, eos_token_id=257)
    flags = ["--precision", "w8a16", "--max-len", "64", "--force"]
    run(command, "export", model, "--out", "artifact", *flags, cwd=tmp_path, env=env)
    process = subprocess.Popen(
        [command, "serve", "artifact", "--port", "0", "--allow-failed"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
        env=env,
    )
    with ready(process) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        (card,) = client.get("/v1/models").json()["data"]
        answer = client.post("/v1/completions", json={"model": card["id"], "prompt": "once", "max_tokens": 4})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
        assert "<html" in client.get("/").text, "the page is in the wheel"
