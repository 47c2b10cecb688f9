"""Choosing what runs a model: the device that was named, or the first that works, with the reason in the log."""

import configparser
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from export.calibration.dataset import CalibrationOptions
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact
from runtime.backends.backend import Backend
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.environment import Environment
from runtime.backends.ort.cpu import OrtCpu
from runtime.backends.ort.cuda import OrtCuda
from runtime.backends.ort.session import OrtSession
from runtime.backends.registry import check_settings, device_name, open_session
from runtime.backends.tensorrt.backend import TensorRt
from runtime.backends.tensorrt.session import TrtSession
from runtime.errors import DeviceUnavailable, HeadraceError, InvalidArtifact, InvalidSetting
from runtime.machine.memory import shares_of
from runtime.settings import EngineSettings, SharedSettings
from runtime.text_model import open_text_model
from tests.support.byte_tokenizer import byte_level_hf
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.server import simulated_backends, simulated_tensorrt
from tests.support.simulated.session import CAPACITY, export_tiny, write_plan_files
from tests.support.tiny.checkpoint import config_of, write_checkpoint

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


def backends_of(sim: SimCuda) -> Sequence[Backend]:
    return simulated_backends(sim)


def test_auto_takes_tensorrt_where_there_is_an_engine(bare: Artifact, with_driver: Environment) -> None:
    plan = write_plan_files(bare, max_batch=2, chunk=8)
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
    plan = write_plan_files(bare, max_batch=2, chunk=8)
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
    def never() -> Cuda:
        raise AssertionError("there is no GPU to try")

    backends = (TensorRt(never), OrtCuda(never), OrtCpu())
    with caplog.at_level(logging.INFO):
        session = open_session(bare, settings(), backends=backends, environment=Environment(root=tmp_path))
    assert isinstance(session, OrtSession)
    assert [record.levelname for record in caplog.records] == ["INFO"] * 2, "nothing to warn of"
    assert "not serving on cuda: no NVIDIA driver is loaded" in caplog.text
    with pytest.raises(DeviceUnavailable, match="no backend can work on this machine"):
        open_session(bare, settings(), backends=backends[:2], environment=Environment(root=tmp_path))


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
    with pytest.raises(InvalidArtifact, match=r"no trt or trt-plain graph.*--dialect ort,trt"):
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
    plan = write_plan_files(bare, max_batch=2, chunk=8)
    sim = SimCuda()
    try:
        with pytest.raises(InvalidSetting, match=said):
            open_session(bare, settings(device="tensorrt", **changes), backends=backends_of(sim))
    finally:
        plan.unlink()
    sim.assert_all_freed()


def test_models_on_one_gpu_share_its_memory_and_not_the_machines(bare: Artifact) -> None:
    """Each pool is taken whole at once: without shares the first takes 80 % of what is free, and the next fail."""
    plan = write_plan_files(bare, max_batch=64, chunk=8)
    weights = plan.stat().st_size
    room = 10_000_000
    sim = SimCuda(total_bytes=3 * weights + room)
    backend = simulated_tensorrt(sim)
    sessions = []
    try:
        for share in shares_of([bare.weight_bytes] * 3, [weights] * 3):
            assert share.host_kv > room, "a share of this machine's memory would be more than the GPU has"
            asked = EngineSettings(device="tensorrt", max_batch=64, prefill_chunk=8, max_len=CAPACITY)
            sessions.append(backend.open(bare, SharedSettings.of(asked, share)))
        slots = [session.info.num_slots for session in sessions]
        assert min(slots) >= 1 and max(slots) <= 1.3 * min(slots), slots
        slot_bytes = CAPACITY * sessions[0].info.kv_bytes_per_token
        assert max(slots) < 64, "memory decides, not --max-batch"
        assert sum(slots) * slot_bytes > 0.5 * room, "what there is, is used"
    finally:
        plan.unlink()
        for session in sessions:
            session.close()
    sim.assert_all_freed()


def test_shares_leave_room_for_what_is_loaded_later() -> None:
    shares = shares_of([10, 20, 30], [100, 200, 300])
    assert [(share.num_to_load, share.weights_to_come) for share in shares] == [(3, 500), (2, 300), (1, 0)]
    assert len({share.host_kv for share in shares}) == 1
    assert [share.of_device(1_000) for share in shares] == [133, 280, 800]
    assert shares[0].of_device(10) == 0


@pytest.mark.parametrize("flag", ["speculate", "draft"])
@pytest.mark.parametrize("device", ["tensorrt", "cuda"])
def test_a_flag_that_a_device_would_not_heed_is_refused(flag: str, device: str) -> None:
    given = {flag: True if flag == "speculate" else "small"}
    with pytest.raises(InvalidSetting, match=f"--{flag} works on --device native or cpu alone, .* says {device}"):
        check_settings(settings(device=device, **given))
    check_settings(settings(device="cpu", **given))


def test_threads_are_the_cpus() -> None:
    with pytest.raises(InvalidSetting, match="--threads works on --device native or cpu or openvino alone"):
        check_settings(settings(device="cuda", threads=2))


def test_speculation_where_auto_found_a_gpu_is_refused_and_the_gpu_let_go(
    tmp_path: Path,
) -> None:
    """The only backend handed in is the GPU's, so that is what `auto` finds."""
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    (source / "tokenizer.json").write_text(byte_level_hf().to_str())
    artifact = export_model(ExportOptions(model=str(source), out=tmp_path / "artifact", dialects=("ort", "trt")))
    write_plan_files(artifact, max_batch=2, chunk=8)
    sim = SimCuda()
    backends = [simulated_tensorrt(sim)]
    open_text_model(artifact.path, settings(device="auto"), backends=backends).close()
    with pytest.raises(InvalidSetting, match=r"--speculate does nothing on tensorrt-rtx .*or say --device cpu"):
        open_text_model(artifact.path, settings(device="auto", speculate=True), backends=backends)
    sim.assert_all_freed()
    open_text_model(artifact.path, settings(device="cpu", speculate=True)).close()


def test_a_model_that_was_loaded_beside_a_bad_tokenizer_is_let_go(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama"))
    artifact = export_model(ExportOptions(model=str(source), out=tmp_path / "artifact", dialects=("ort", "trt")))
    write_plan_files(artifact, max_batch=2, chunk=8)
    sim = SimCuda()
    with pytest.raises(InvalidArtifact, match=r"has no tokenizer\.json"):
        open_text_model(artifact.path, settings(device="auto"), backends=[simulated_tensorrt(sim)])
    sim.assert_all_freed()


def test_speculation_over_an_int8_cache_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("llama", num_hidden_layers=1))
    text = QuantizationOptions(text=CalibrationOptions(num_samples=4, length=32))
    artifact = export_model(
        ExportOptions(model=str(source), out=tmp_path / "artifact", kv="int8", force=True, quantization=text)
    )
    for given, flag in (({"speculate": True}, "--speculate"), ({"draft": str(artifact.path)}, "--draft")):
        with pytest.raises(InvalidSetting, match=f"{flag} does nothing for .* whose KV cache is in 8 bits"):
            open_text_model(artifact.path, settings(device="cpu", **given), allow_failed=True, backends=[])


def test_an_unknown_device() -> None:
    with pytest.raises(InvalidSetting, match="must be one of auto, tensorrt, cuda, native, cpu, openvino, got 'gpu'"):
        device_name("gpu")


@pytest.mark.parametrize("verb", ["export", "verify"])
def test_without_onnx_runtime_a_verb_names_the_extra(bare: Artifact, tmp_path: Path, verb: str) -> None:
    arguments = {
        "export": ["export", str(bare.path.parent / "checkpoint"), "--out", str(tmp_path / "out")],
        "verify": ["verify", str(bare.path)],
    }[verb]
    absent = "sys.modules['onnxruntime'] = sys.modules['openvino'] = None"
    code = f"import sys; {absent}; import headrace; sys.exit(headrace.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0].endswith("pip install 'headrace[cpu]'")


def test_no_extra_is_installed_unasked() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    assert "onnxruntime" not in config["options"]["install_requires"]
    assert {"cpu", "cuda", "rtx", "tensorrt"} <= set(config["options.extras_require"])
