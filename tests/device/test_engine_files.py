"""Engine files without TensorRT: names, descriptions, profiles, what is refused and why, what pruning leaves."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.artifact.writer import file_entry, write_manifest
from export.storage.whole_file import write_whole
from export.tensorrt.memory import check_fits, predicted_peak
from export.tensorrt.profiles import PlanLimits, derive_profiles, input_shape
from export.tensorrt.progress import Monitor
from export.tensorrt.store import list_files, plan_directory, prune, write_plan_files
from export.tensorrt.timings import attach_timings, keep_timings
from runtime.artifact.manifest import (
    SCHEMA_VERSION,
    Artifact,
    FileEntry,
    KvContract,
    Manifest,
    ModelDims,
    read_manifest,
)
from runtime.artifact.plan_files import (
    PROFILES,
    PlanInfo,
    Shape,
    find_plan,
    plans_of,
    read_plan_info,
    weight_files,
)
from runtime.errors import HeadraceError, InvalidPlan, InvalidSetting

PLAN = b"a plan" * 100
DIMS = ModelDims(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=320,
    max_len=256,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A manifest whose hashes are made up: nothing here reads the files it names."""
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        source="tiny",
        precision="fp16",
        dims=DIMS,
        kv=KvContract(dtype="float16"),
        dialects={"trt": "model.trt.onnx"},
        is_tied=False,
        eos_ids=(2,),
        bos_id=1,
        files={
            "model.trt.onnx": FileEntry(size=1, sha256="a" * 64),
            "weights.trt.bin": FileEntry(size=1, sha256="b" * 64),
        },
        versions={},
    )
    write_manifest(tmp_path, manifest)
    return Artifact(tmp_path, manifest, {})


def description(artifact: Artifact, **changes: Any) -> PlanInfo:
    info = PlanInfo(
        target="tensorrt-rtx",
        version="1.7.1.116",
        gpus=("sm80", "sm86"),
        device=None,
        dialect="trt",
        graph="a" * 64,
        weights=weight_files(artifact.manifest),
        profiles=derive_profiles(PlanLimits(max_batch=4), DIMS),
        plan=FileEntry(size=len(PLAN), sha256=hashlib.sha256(PLAN).hexdigest()),
        layers={"attention": 3},
        build={"seconds": 1.0},
    )
    return replace(info, **changes)


def written(artifact: Artifact, **changes: Any) -> Path:
    plan_directory(artifact)
    return write_plan_files(artifact, description(artifact, **changes), PLAN)


def test_a_description_survives_the_disk_and_finds_its_engine(artifact: Artifact) -> None:
    plan = written(artifact)
    info = description(artifact)
    assert plan.name == f"tensorrt-rtx-sm80+sm86-1.7.1.116-{info.key}.plan"
    assert read_plan_info(plan, read_manifest(artifact.path).engines) == info
    assert (info.max_batch, info.max_len, info.prefill_chunk, info.verify_tokens) == (4, 256, 128, 8)
    for gpu in info.gpus:
        found = find_plan(artifact, target="tensorrt-rtx", version="1.7.1.116", gpu=gpu)
        assert (found.path, found.info, found.problem) == (plan, info, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus": ("sm89",)},
        {"version": "1.7.2"},
        {"graph": "c" * 64},
        {"weights": {"weights.trt.bin": "c" * 64}},
        {"device": "Orin"},
        {"profiles": derive_profiles(PlanLimits(max_batch=5), DIMS)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_key_tells_apart_whatever_makes_another_engine(artifact: Artifact, changes: dict[str, Any]) -> None:
    assert description(artifact, **changes).key != description(artifact).key


def test_what_decides_nothing_is_not_in_the_key(artifact: Artifact) -> None:
    assert (
        description(artifact, layers={}, build={}, plan=FileEntry(size=1, sha256="")).key == description(artifact).key
    )


def test_the_largest_of_several_engines_is_taken(artifact: Artifact) -> None:
    for batch in (2, 16, 8):
        written(artifact, profiles=derive_profiles(PlanLimits(max_batch=batch), DIMS))
    found = find_plan(artifact, target="tensorrt-rtx", version="1.7.1.116", gpu="sm86")
    assert found.info is not None and found.info.max_batch == 16


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"version": "1.8.0"}, r"no engine for tensorrt-rtx 1\.8\.0 on sm86, there is: tensorrt-rtx-sm80\+sm86-1\.7"),
        ({"gpu": "sm120"}, r"on sm120.*`headrace engine .* --gpu sm120` builds one"),
        ({"target": "tensorrt"}, "no engine for tensorrt 1"),
    ],
)
def test_an_engine_for_another_gpu_or_version_is_not_taken(
    artifact: Artifact, wanted: dict[str, str], word: str
) -> None:
    written(artifact)
    with pytest.raises(InvalidPlan, match=word):
        find_plan(artifact, **{"target": "tensorrt-rtx", "version": "1.7.1.116", "gpu": "sm86", **wanted})


def test_an_engine_built_on_one_device_is_for_that_model_alone(artifact: Artifact) -> None:
    written(artifact, target="tensorrt", version="11.4", gpus=("sm87",), device="Orin")
    asked = {"target": "tensorrt", "version": "11.4", "gpu": "sm87"}
    assert find_plan(artifact, **asked, device="Orin").problem is None
    with pytest.raises(InvalidPlan, match=r"on sm87 \(Orin Nano\)"):
        find_plan(artifact, **asked, device="Orin Nano")


def truncate(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:100])


def alter(plan: Path) -> None:
    plan.write_bytes(b"b" + plan.read_bytes()[1:])


def lose_description(plan: Path) -> None:
    plan.with_suffix(".json").unlink()


def garble_description(plan: Path) -> None:
    plan.with_suffix(".json").write_text("{")


def edit_description(plan: Path) -> None:
    file = plan.with_suffix(".json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "gpus": ["sm120"]}))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate, "has 100 bytes, its .json says 600"),
        (alter, "has changed: sha256"),
        (lose_description, "no readable .*json beside it"),
        (garble_description, "manifest.json lists it with another hash"),
        (edit_description, "manifest.json lists it with another hash"),
    ],
)
def test_a_damaged_engine_is_named_and_pruned(artifact: Artifact, damage: Any, word: str) -> None:
    plan, good = written(artifact), written(artifact, gpus=("sm89",))
    damage(plan)
    with pytest.raises(InvalidPlan, match=word):
        find_plan(artifact, target="tensorrt-rtx", version="1.7.1.116", gpu="sm86")
    assert find_plan(artifact, target="tensorrt-rtx", version="1.7.1.116", gpu="sm89").path == good
    assert plan in prune(artifact)
    assert sorted(good.parent.iterdir()) == [good.with_suffix(".json"), good]


@pytest.mark.parametrize(
    ("damage", "word"),
    [(garble_description, "is not JSON"), (edit_description, "another engine than its name says")],
)
def test_a_wrong_description_is_refused_even_where_it_is_listed(artifact: Artifact, damage: Any, word: str) -> None:
    plan = written(artifact)
    damage(plan)
    list_files(artifact, plan.with_suffix(".json"))
    with pytest.raises(InvalidPlan, match=word):
        find_plan(artifact, target="tensorrt-rtx", version="1.7.1.116", gpu="sm86")


def test_an_engine_that_the_manifest_does_not_list_is_not_opened(artifact: Artifact) -> None:
    plan = written(artifact)
    assert list(read_manifest(artifact.path).engines) == [plan.with_suffix(".json").name]
    write_manifest(artifact.path, artifact.manifest)
    with pytest.raises(InvalidPlan, match=r"is not used: manifest\.json does not list it; build the engine again"):
        find_plan(artifact, target="tensorrt-rtx", version="1.7.1.116", gpu="sm86")


def test_builds_at_once_keep_each_other_in_the_list_and_what_is_gone_leaves_it(artifact: Artifact) -> None:
    with ThreadPoolExecutor(4) as threads:
        plans = list(threads.map(lambda gpu: written(artifact, gpus=(gpu,)), ("sm80", "sm86", "sm89", "sm120")))
    assert set(read_manifest(artifact.path).engines) == {plan.with_suffix(".json").name for plan in plans}
    plans[0].unlink()
    prune(artifact)
    assert set(read_manifest(artifact.path).engines) == {plan.with_suffix(".json").name for plan in plans[1:]}


def test_an_engine_of_another_export_is_stale(artifact: Artifact) -> None:
    plan = written(artifact, weights={"weights.trt.bin": "c" * 64})
    (found,) = plans_of(artifact)
    assert found.problem is not None and "another export" in found.problem
    assert plan in prune(artifact) and not plan.parent.exists()


def test_what_a_killed_build_left_goes_and_what_a_running_one_writes_stays(artifact: Artifact) -> None:
    plan = written(artifact)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = (plan.with_name(f"{plan.name}.partial-{pid}") for pid in (ended.pid, os.getppid()))
    left.touch()
    running.touch()
    assert prune(artifact) == [left]
    assert prune(artifact, everything=True) == sorted([plan, plan.with_suffix(".json")])
    assert list(plan.parent.iterdir()) == [running]
    running.unlink()


def test_a_plan_that_cannot_be_written_leaves_nothing(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    directory = plan_directory(artifact)
    with pytest.raises(HeadraceError, match="the disk is full"):
        write_whole(directory / "x.plan", PLAN)
    assert not list(directory.iterdir())


@given(st.integers(1, 64), st.integers(1, 512), st.integers(2, 256), st.integers(1, 16), st.data())
def test_every_run_a_scheduler_makes_lies_in_a_profile(
    batch: int, chunk: int, max_len: int, verified: int, data: st.DataObject
) -> None:
    limits = PlanLimits(max_batch=batch, prefill_chunk=chunk, max_len=max_len, verify_tokens=verified)
    profiles = dict(zip(PROFILES, derive_profiles(limits, DIMS), strict=True))
    rows = data.draw(st.integers(1, batch))
    assert profiles["decode"].holds(Shape(rows, 1, rows, max_len))
    width = data.draw(st.integers(1, min(chunk, max_len)))
    assert profiles["prefill"].holds(Shape(rows, width, rows, max_len))
    assert profiles["prefill"].holds(Shape(1, width, width, max_len)), "scoring wants the logits of every token"
    width = data.draw(st.integers(1, min(verified, max_len)))
    assert profiles["verify"].holds(Shape(rows, width, rows * width, max_len))
    assert not any(profile.holds(Shape(batch + 1, 1, 1, max_len)) for profile in profiles.values())
    assert not any(profile.holds(Shape(1, 1, 1, max_len - 1)) for profile in profiles.values())


def test_inputs_get_their_shapes_from_the_profile() -> None:
    decode, prefill, _ = derive_profiles(PlanLimits(max_batch=4, prefill_chunk=32, max_len=64), DIMS)
    assert [input_shape("input_ids", DIMS, prefill, end) for end in range(3)] == [(1, 1), (1, 32), (4, 32)]
    assert [input_shape("logits_idx", DIMS, decode, end) for end in range(3)] == [(1,), (4,), (4,)]
    assert input_shape("past.2.v", DIMS, decode, 2) == (4, 2, 64, 16)


@pytest.mark.parametrize(
    ("limits", "word"),
    [({"max_batch": 0}, "--max-batch"), ({"max_len": 1}, "--max-len"), ({"verify_tokens": 0}, "--v")],
)
def test_limits_out_of_range_are_named(limits: dict[str, int], word: str) -> None:
    with pytest.raises(InvalidSetting, match=word):
        PlanLimits(**limits)


def test_slots_longer_than_the_export_are_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"--max-len 512 is more than the 256 tokens"):
        derive_profiles(PlanLimits(max_len=512), DIMS)


def test_a_build_that_cannot_fit_is_refused_with_the_numbers() -> None:
    predicted = predicted_peak(4_000_000_000)
    check_fits(predicted, 4_000_000_000, available=predicted)
    with pytest.raises(HeadraceError, match=r"takes about .* GB .*4\.0 GB of weights.* and 3\.0 GB are free"):
        check_fits(predicted, 4_000_000_000, available=3_000_000_000)


def test_progress_counts_phases_within_phases_and_never_goes_back() -> None:
    gained: list[int] = []
    monitor = Monitor(gained.append)
    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0)
    assert sum(gained) == 50
    monitor.phase_start("tactics", "build", 4)
    monitor.step_complete("tactics", 1)
    assert sum(gained) == 75
    monitor.phase_finish("tactics")
    monitor.phase_start("tactics", "build", 10)
    monitor.step_complete("tactics", 0)
    assert sum(gained) == 75
    monitor.step_complete("unknown", 0)
    monitor.step_complete("build", 1)
    monitor.phase_finish("build")
    assert sum(gained) == 100 and min(gained) > 0


def test_ctrl_c_in_a_callback_is_kept_and_asks_the_library_to_stop() -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monitor = Monitor(interrupted)
    monitor.phase_start("build", None, 2)
    assert not monitor.step_complete("build", 0)
    assert isinstance(monitor.stopped, KeyboardInterrupt)


class Timings:
    """A timing cache as `tensorrt` has it, whose bytes must begin with its GPU's name."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data or b"Orin: measured"


class TimingConfig:
    """The part of IBuilderConfig that attach_timings uses; `tensorrt` itself does not start without a GPU."""

    def __init__(self) -> None:
        self.cache: Timings | None = None

    def create_timing_cache(self, data: bytes) -> Timings:
        return Timings(data)

    def set_timing_cache(self, cache: Timings, *, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or cache.data[:4] in (b"", b"Orin")
        self.cache = cache if fits else self.cache
        return fits

    def get_timing_cache(self) -> Timings | None:
        return self.cache


def test_a_timing_cache_is_kept_and_a_foreign_one_ignored_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "a.timings", TimingConfig()
    assert attach_timings(config, file, None)
    keep_timings(config, file)
    config = TimingConfig()
    assert attach_timings(config, file, file_entry(file))
    assert config.cache is not None and config.cache.data == b"Orin: measured"
    assert attach_timings(config, file, None) and config.cache.data == b"", "what is not listed is not read"
    assert not capsys.readouterr().err
    file.write_bytes(b"Thor: measured")
    assert not attach_timings(config, file, file_entry(file)) and config.cache.data == b""
    assert "another GPU or release" in capsys.readouterr().err
