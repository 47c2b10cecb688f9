"""Choosing what runs a model: the device that was named, or the first that works, with the reason in the log."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from runtime.artifact import Artifact
from runtime.devices import Backend, open_session
from runtime.environment import Environment
from runtime.errors import DeviceUnavailable, HeadraceError, InvalidEngine, InvalidSetting
from runtime.ort_session import OrtSession
from runtime.settings import EngineSettings
from runtime.trt_session import TrtSession
from tests.sim_cuda import SimCuda
from tests.sim_server import simulated_backends
from tests.sim_session import CAPACITY, export_tiny, write_engine

SMALL = {"max_batch": 2, "prefill_chunk": 8, "kv_memory": 10**6, "max_len": CAPACITY}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with both graphs and no engine."""
    return export_tiny(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def with_driver(tmp_path: Path) -> Environment:
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\n")
    return Environment(root=tmp_path)


def settings(**changes: object) -> EngineSettings:
    return EngineSettings(**{**SMALL, **changes})  # type: ignore[arg-type]  # fields by name


def backends_of(sim: SimCuda) -> Mapping[str, Backend]:
    return simulated_backends(sim)


def test_auto_takes_tensorrt_where_there_is_an_engine(bare: Artifact, with_driver: Environment) -> None:
    plan = write_engine(bare, max_batch=2, chunk=8)
    try:
        session = open_session(bare, settings(), backends=backends_of(SimCuda()), environment=with_driver)
        assert isinstance(session, TrtSession) and session.info.device.startswith("tensorrt-rtx")
        session.close()
    finally:
        plan.unlink()


def test_auto_falls_back_and_says_why(
    bare: Artifact, with_driver: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        session = open_session(bare, settings(), backends=backends_of(SimCuda()), environment=with_driver)
    assert isinstance(session, OrtSession)
    text = caplog.text
    assert "not serving on tensorrt" in text and "has no engine for tensorrt-rtx" in text and "headrace engine" in text


def test_a_device_without_room_is_passed_over(
    bare: Artifact, with_driver: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    plan = write_engine(bare, max_batch=2, chunk=8)
    sim = SimCuda(total_bytes=10_000)
    try:
        session = open_session(bare, settings(), backends=backends_of(sim), environment=with_driver)
    finally:
        plan.unlink()
    assert isinstance(session, OrtSession)
    sim.assert_all_freed()
    assert "the device has no" in caplog.text


def test_without_a_gpu_auto_tries_nothing_else(
    bare: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def never(_artifact: Artifact, _settings: EngineSettings) -> OrtSession:
        raise AssertionError("there is no GPU to try")

    backends = {**backends_of(SimCuda()), "tensorrt": never, "cuda": never}
    backends["cpu"] = backends.pop("cpu")
    session = open_session(bare, settings(), backends=backends, environment=Environment(root=tmp_path))
    assert isinstance(session, OrtSession)
    assert not caplog.records, "nothing to warn of"


@pytest.mark.parametrize(
    ("sim", "kind", "said"),
    [
        (SimCuda(num_devices=0), DeviceUnavailable, "CUDA finds no device"),
        (SimCuda(), DeviceUnavailable, "has no engine for"),
    ],
)
def test_a_device_that_was_named_is_the_one_or_an_error(
    bare: Artifact, sim: SimCuda, kind: type[HeadraceError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        open_session(bare, settings(device="tensorrt"), backends=backends_of(sim))
    sim.assert_all_freed()


def test_an_artifact_without_a_graph_for_tensorrt(tmp_path: Path) -> None:
    artifact = export_tiny(tmp_path, dialects=("ort",))
    with pytest.raises(InvalidEngine, match="--dialect ort,trt"):
        open_session(artifact, settings(device="tensorrt"), backends=backends_of(SimCuda()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_len": CAPACITY + 1}, "--max-len 129 is beyond the 128 tokens of a slot"),
        ({"prefill_chunk": 64}, "--prefill-chunk 64 is beyond the 8 tokens"),
        ({"kv_memory": 1000}, "one KV slot of 128 tokens takes"),
    ],
)
def test_settings_beyond_the_engine(bare: Artifact, changes: dict[str, object], said: str) -> None:
    plan = write_engine(bare, max_batch=2, chunk=8)
    sim = SimCuda()
    try:
        with pytest.raises(InvalidSetting, match=said):
            open_session(bare, settings(device="tensorrt", **changes), backends=backends_of(sim))
    finally:
        plan.unlink()
    sim.assert_all_freed()


def test_an_unknown_device() -> None:
    with pytest.raises(InvalidSetting, match="--device must be one of auto, tensorrt, cuda, cpu, got 'gpu'"):
        EngineSettings(device="gpu")
