"""On a real GPU, what the simulation holds elsewhere: engines built for it, the same tokens. `make test-gpu`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from export.tensorrt.build import PlanOptions, build_plan
from export.tensorrt.profiles import PlanLimits
from runtime.artifact.manifest import Artifact
from runtime.artifact.plan_files import TARGETS
from runtime.backends.environment import CudaDevice, Environment, load_cuda
from runtime.backends.registry import open_session
from runtime.backends.tensorrt.library import open_library
from runtime.commands.replay import replay
from runtime.engine.engine import Engine
from runtime.errors import HeadraceError
from runtime.session.session import Session
from runtime.settings import EngineSettings
from tests.support.engine_requests import CHUNK, requests, submit
from tests.support.simulated.session import export_tiny

pytestmark = pytest.mark.gpu
ON_TENSORRT = EngineSettings(device="tensorrt", max_batch=5, prefill_chunk=CHUNK, max_len=128)


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    """The GPU; every test here is skipped, with the reason, where there is none."""
    device = Environment().cuda_device
    if isinstance(device, str):
        pytest.skip(f"no GPU: {device}")
    return device


@pytest.fixture(scope="module", params=["fp32", "fp16", "w8a8"])
def on_tensorrt(
    request: pytest.FixtureRequest, gpu: CudaDevice, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Artifact, Session]]:
    """A tiny model's session, on an engine built here by the first library that is installed."""
    for target in TARGETS:
        try:
            dialect = open_library(target).dialect
            break
        except HeadraceError as error:
            reason = str(error)
    else:
        pytest.skip(f"no TensorRT: {reason}")
    artifact = export_tiny(tmp_path_factory.mktemp("gpu"), precision=request.param, dialects=("ort", dialect))
    limits = PlanLimits(max_batch=5, prefill_chunk=64, max_len=128)
    build_plan(artifact, PlanOptions(target=target, gpus=(gpu.capability,), limits=limits))
    session = open_session(artifact, ON_TENSORRT)
    yield artifact, session
    session.close()


def test_tensorrt_gives_the_receipts_tokens(on_tensorrt: tuple[Artifact, Session]) -> None:
    found = replay(*on_tensorrt)
    assert found.passed, found


def test_tensorrt_serves_requests_that_join_and_leave(on_tensorrt: tuple[Artifact, Session]) -> None:
    """The same tokens in a batch as alone, or all but near ties: kernels differ by batch size on a GPU."""
    _, session = on_tensorrt
    alone = []
    for idx, (prompt, params) in enumerate(requests()):
        engine = Engine(session, prefill_chunk=CHUNK)
        sink = submit(engine, str(idx), prompt, params)
        while engine.has_work:
            engine.step()
        alone.append(sink[0].token_id)
    together, sinks = Engine(session, prefill_chunk=CHUNK), []
    for idx, (prompt, params) in enumerate(requests()):
        sinks.append(submit(together, str(idx), prompt, params))
        together.step()
    while together.has_work:
        together.step()
    equal = [sink[0].token_id == token for sink, token in zip(sinks, alone, strict=True)]
    assert sum(equal) >= len(equal) - 1


def test_onnx_runtime_on_cuda_gives_the_receipts_tokens(gpu: CudaDevice, tmp_path: Path) -> None:
    artifact = export_tiny(tmp_path, precision="fp16", dialects=("ort",))
    try:
        session = open_session(artifact, replace(ON_TENSORRT, device="cuda"))
    except HeadraceError as error:
        pytest.skip(f"no ONNX Runtime on CUDA: {error}")
    found = replay(artifact, session)
    session.close()
    assert found.passed, found


def test_memory_is_given_back(on_tensorrt: tuple[Artifact, Session]) -> None:
    artifact, _ = on_tensorrt
    cuda = load_cuda()
    open_session(artifact, ON_TENSORRT).close()  # what libraries keep, they keep from now on
    before = cuda.free_memory()
    open_session(artifact, ON_TENSORRT).close()
    assert before - cuda.free_memory() < 2**20
    cuda.close()
