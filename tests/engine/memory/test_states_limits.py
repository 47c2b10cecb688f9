"""What a model with states refuses by name: drafts, devices, too little memory."""

import math

import pytest

from export.model.checks.tensors import expected_tensors
from export.model.families.architectures import parse_config
from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import WITHOUT_CUTS, Artifact
from runtime.backends.backend import Backend
from runtime.backends.draft_session import open_draft
from runtime.backends.openvino.backend import OpenVino
from runtime.backends.ort.cuda import OrtCuda
from runtime.backends.registry import open_session
from runtime.backends.tensorrt.backend import TensorRt
from runtime.commands.fit import rows
from runtime.commands.inspect_artifact import as_lines, num_parameters
from runtime.errors import InvalidArtifact, InvalidSetting
from runtime.settings import EngineSettings
from runtime.text_model import open_text_model
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny.architectures import write_random
from tests.support.tiny.artifact import TinyExports
from tests.support.tiny.hybrids import LFM2

SMALL = {"max_batch": 2, "max_len": 64, "kv_memory": 10**6, "device": "cpu"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("lfm2")
    source = write_random(path / "checkpoint", LFM2)
    write_byte_tokenizer(source)
    return export_model(ExportOptions(model=str(source), out=path / "artifact", dialects=("ort", "trt"), force=True))


def settings(**changes: object) -> EngineSettings:
    return EngineSettings(**{**SMALL, **changes})  # type: ignore[arg-type]  # fields by name


def test_inspect_says_what_the_states_are(artifact: Artifact) -> None:
    lines = "\n".join(as_lines(artifact))
    # Three layers with two inputs of 64 channels each.
    assert "1.5 kB of states in a slot; 1 of 4 layers have attention" in lines and WITHOUT_CUTS in lines


def test_drafts_are_refused(artifact: Artifact, tiny: TinyExports) -> None:
    with pytest.raises(InvalidSetting, match=r"--speculate does nothing for .* recurrent states"):
        open_text_model(artifact.path, settings(speculate=True))
    with pytest.raises(InvalidSetting, match=r"--draft .* recurrent states, which cannot be taken back"):
        open_draft(str(artifact.path), artifact, settings())


@pytest.mark.parametrize("backend", [TensorRt(), OrtCuda(), OpenVino()], ids=lambda backend: backend.name)
def test_a_device_that_runs_no_states_says_so(artifact: Artifact, backend: Backend) -> None:
    with pytest.raises(InvalidArtifact, match=f"which --device {backend.name} does not run; use --device cpu or nat"):
        backend.check(artifact)


def test_fit_and_inspect_count_them(artifact: Artifact) -> None:
    matrices = [shape for shape in expected_tensors(parse_config(LFM2)).values() if len(shape) == 2]
    assert num_parameters(artifact) == sum(math.prod(shape) for shape in matrices)
    (row, *_) = rows(artifact, memory=6 * 10**7, max_batch=10_000)
    assert artifact.manifest.state_bytes == 1536
    (length, count), *_ = row.slots.items()
    assert count == row.kv_budget // (length * row.token_bytes + 1536) < row.kv_budget // (length * row.token_bytes)


def test_the_states_of_all_slots_are_taken_from_the_memory(artifact: Artifact) -> None:
    session = open_session(artifact, settings())
    assert session.info.kv_budget == 10**6 - 2 * artifact.manifest.state_bytes
    session.close()
    with pytest.raises(InvalidSetting, match=r"only .* may be used, beside 1.5 kB of states in each of 400 slots"):
        open_session(artifact, settings(max_batch=400, kv_memory=400 * 1536 + 100))
