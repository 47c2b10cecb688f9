"""The native library is found by its sources, written whole or not at all, and refused with a reason."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import DeviceUnavailable, InvalidSetting
from runtime.native import build as building
from runtime.native import library


@pytest.fixture
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sources in another folder, where no library is."""
    here = tmp_path / "native"
    shutil.copytree(library.HERE, here, ignore=shutil.ignore_patterns("built", "__pycache__"))
    for module in (library, building):
        monkeypatch.setattr(module, "BUILD", here / "built")
    monkeypatch.setattr(library, "HERE", here)
    for cached in (library.library_file, library.load_library):
        cached.cache_clear()
    yield here
    for cached in (library.library_file, library.load_library):
        cached.cache_clear()


def test_a_changed_source_is_another_library(copied_sources: Path) -> None:
    before = library.library_file()
    library.library_file.cache_clear()
    (copied_sources / "norm.cc").write_text("// changed\n")
    assert library.library_file() != before


def test_an_unbuilt_library_says_what_to_type(copied_sources: Path) -> None:
    assert not library.is_built()
    with pytest.raises(DeviceUnavailable, match="make native"):
        library.load_library()


def test_without_a_compiler_it_says_which(copied_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DeviceUnavailable, match="install g"):
        building.build()


def test_a_failed_build_leaves_no_library(copied_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(DeviceUnavailable, match="do not compile"):
        building.build()
    assert not list((copied_sources / "built").iterdir())


def test_an_unknown_variant_is_refused(native_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA, "sse9")
    library.load_library.cache_clear()
    with pytest.raises(InvalidSetting, match=r"HEADRACE_NATIVE_ISA=sse9: choose from generic"):
        library.load_library()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of the binutils")
@pytest.mark.usefixtures("native_library")
def test_a_variants_code_is_in_its_own_namespace(tmp_path: Path) -> None:
    """A function that two variants share by name would run with the instructions of either: the linker keeps one."""
    compiler = building.find_compiler()
    assert compiler is not None
    for command, target in building.compilations(compiler, tmp_path):
        variant = target.name.split(".")[1]
        if variant != "avx2":  # names do not depend on which
            continue
        subprocess.run(command, check=True, capture_output=True)
        listed = subprocess.run(["nm", "-C", "--defined-only", target], check=True, capture_output=True, text=True)
        shared = [
            line
            for line in listed.stdout.splitlines()
            if line.split(maxsplit=2)[1] in "WVuTDBR" and f"headrace::{variant}::" not in line
        ]
        assert not shared, target.name


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("name", library.VARIANTS)
def test_the_environment_chooses_the_variant(name: str) -> None:
    command = [sys.executable, "-m", "runtime.native.build"]
    done = subprocess.run(command, env={**os.environ, library.ISA: name}, capture_output=True, text=True, check=False)
    if "does not run it" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0 and done.stdout.endswith(f": {name}\n")
