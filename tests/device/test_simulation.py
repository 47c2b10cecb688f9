"""The doubles of CUDA and TensorRT are strict, and have no name or parameter that the real packages lack."""

import ast
import inspect
import re
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.artifact.manifest import Artifact
from runtime.artifact.plan_files import PROFILES
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.backends.tensorrt.plan import LoadedPlan, ProfileContext
from tests.support.simulated import tensorrt as sim_tensorrt
from tests.support.simulated.cuda import MisuseError, SimCuda
from tests.support.simulated.session import CAPACITY, TARGET, export_tiny, plan_of, write_plan_files
from tests.support.simulated.tensorrt import VERSION, SimTensorRT

RUNTIME = Path(__file__).parents[2] / "runtime"
TRT_CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext")
TRT_ENUMS = ("EngineValidity", "EngineInvalidityDiagnostics", "ExecutionContextAllocationStrategy")


def public_names(thing: object) -> list[str]:
    return [name for name in vars(thing) if not name.startswith("_")]


def real_cuda() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")


def real_tensorrt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def attributes_of(file: str, roots: set[str]) -> set[str]:
    """Names taken from the given variables and attributes in a source file: `self._api.NAME`, `trt.NAME`."""
    found = set()
    for node in ast.walk(ast.parse((RUNTIME / file).read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name in roots:
                found.add(node.attr)
    return found


def test_every_cuda_name_that_is_used_is_simulated_and_real() -> None:
    used = attributes_of("backends/cuda/cuda.py", {"_api", "api"})
    assert len(used) > 20
    real = real_cuda()
    for name in used:
        assert hasattr(SimCuda, name), f"{name} is not simulated"
        assert hasattr(real, name), f"{name} is not in cuda.bindings.runtime"


@pytest.mark.parametrize("name", [name for name in public_names(SimCuda) if name.startswith("cuda")])
def test_cuda_has_the_name_with_these_parameters(name: str) -> None:
    simulated, real = getattr(SimCuda, name), getattr(real_cuda(), name)
    if isinstance(simulated, type) and issubclass(simulated, IntEnum):
        assert {member.name: member.value for member in simulated} == {
            member.name: int(getattr(real, member.name)) for member in simulated
        }
    elif callable(simulated):
        assert list(inspect.signature(real).parameters) == list(inspect.signature(simulated).parameters)[1:]
    else:
        assert simulated == real


def test_every_tensorrt_name_that_is_used_is_simulated() -> None:
    used = attributes_of("backends/tensorrt/plan.py", {"_trt", "engine", "_runtime", "_context"})
    simulated = set(public_names(SimTensorRT)) | {"Runtime"}
    for name in TRT_CLASSES:
        kind = getattr(sim_tensorrt, name)
        simulated |= {each for base in kind.__mro__ for each in public_names(base)}
    assert len(used) > 12
    assert used <= simulated, f"not simulated: {used - simulated}"


@pytest.mark.parametrize("name", TRT_CLASSES)
def test_tensorrt_has_the_methods_with_these_parameters(name: str) -> None:
    simulated, real = getattr(sim_tensorrt, name), getattr(real_tensorrt(), name)
    names = {each for base in simulated.__mro__ for each in public_names(base)}
    assert names
    for each in names:
        theirs, ours = getattr(real, each), getattr(simulated, each)
        if isinstance(ours, property):
            assert isinstance(theirs, property), each
            continue
        wanted = list(inspect.signature(ours).parameters)[1:]
        assert wanted in signatures(theirs, each), f"{name}.{each}{wanted}: {theirs.__doc__}"


def signatures(method: Callable[..., Any], name: str) -> list[list[str]]:
    """Parameter names of every overload, from what pybind11 writes into the docstring."""
    lines = re.findall(rf"{name}\(self: \S+?(?:, (.*))?\) -> ", method.__doc__ or "")
    return [re.findall(r"(?:^|, )(\w+): ", line) for line in lines]


@pytest.mark.parametrize("name", TRT_ENUMS)
def test_tensorrt_has_the_values(name: str) -> None:
    simulated, real = getattr(sim_tensorrt, name), getattr(real_tensorrt(), name)
    assert {each.name: each.value for each in simulated} == {k: int(v) for k, v in real.__members__.items()}


def test_tensorrt_has_the_logger() -> None:
    real = real_tensorrt()
    for level in sim_tensorrt.Severity:
        assert int(getattr(real.ILogger.Severity, level.name)) == level.value
    assert ["severity", "msg"] in signatures(real.ILogger.log, "log")
    library = TrtLibrary(TARGET, real, real.__version__)
    logger = library.logger()
    logger.inner.log(real.ILogger.Severity.ERROR, "a word")
    assert logger.errors == ["a word"]
    real.Runtime(logger.inner)


class TestCuda:
    @pytest.fixture
    def sim(self) -> SimCuda:
        return SimCuda()

    @pytest.fixture
    def cuda(self, sim: SimCuda) -> Cuda:
        return Cuda(sim)

    def test_the_host_sees_nothing_before_it_waits(self, cuda: Cuda) -> None:
        device, host = cuda.allocate(8, "x"), cuda.allocate_pinned(8, "x")
        view = host.view(np.int64, (1,))
        view[0] = 5
        cuda.copy_in(device.address, host.address, 8)
        cuda.synchronize()
        cuda.copy_out(host.address, device.address, 8)
        assert view[0] == -1, "what a copy is on its way to cannot be used"
        cuda.synchronize()
        assert view[0] == 5

    def test_new_device_memory_is_no_number(self, cuda: Cuda) -> None:
        device, host = cuda.allocate(8, "x"), cuda.allocate_pinned(8, "x")
        cuda.copy_out(host.address, device.address, 8)
        cuda.synchronize()
        assert np.isnan(host.view(np.float32, (2,))).all()

    def test_host_memory_changed_under_a_copy(self, cuda: Cuda) -> None:
        device, host = cuda.allocate(8, "x"), cuda.allocate_pinned(8, "x")
        cuda.copy_in(device.address, host.address, 8)
        host.view(np.int64, (1,))[0] = 7
        with pytest.raises(MisuseError, match="changed while it was copied"):
            cuda.synchronize()

    def test_a_copy_out_of_bounds(self, cuda: Cuda) -> None:
        device, host = cuda.allocate(8, "x"), cuda.allocate_pinned(16, "x")
        with pytest.raises(MisuseError, match="run out of their block"):
            cuda.copy_in(device.address, host.address, 16)
        with pytest.raises(MisuseError, match="run out of their pinned block"):
            cuda.copy_out(host.address + 9, device.address, 8)

    def test_pageable_memory(self, cuda: Cuda) -> None:
        device, array = cuda.allocate(8, "x"), np.zeros(1)
        with pytest.raises(MisuseError, match="not pinned"):
            cuda.copy_in(device.address, array.ctypes.data, 8)

    def test_freed_memory(self, cuda: Cuda) -> None:
        device = cuda.allocate(8, "x")
        address = device.address
        cuda.clear(address, 8)
        cuda.synchronize()
        device.free()
        uses: list[Callable[[], object]] = [lambda: cuda.clear(address, 8), lambda: cuda.free(address)]
        for use in uses:
            with pytest.raises(MisuseError, match="freed"):
                use()

    def test_memory_freed_under_work(self, cuda: Cuda) -> None:
        device = cuda.allocate(8, "x")
        cuda.clear(device.address, 8)
        with pytest.raises(MisuseError, match="while work on a stream uses it"):
            device.free()

    def test_a_capture_allows_no_waiting_and_no_allocation(self, cuda: Cuda) -> None:
        cuda.begin_capture()
        for use in (cuda.synchronize, lambda: cuda.allocate(8, "x"), cuda.begin_capture):
            with pytest.raises(MisuseError):
                use()
        graph = cuda.end_capture()
        graph.launch()
        executable = graph._executable
        graph.free()
        with pytest.raises(MisuseError, match="after it was destroyed"):
            cuda.launch(executable)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = export_tiny(tmp_path_factory.mktemp("tiny"), dialects=("trt",))
    write_plan_files(artifact, max_batch=2, chunk=8)
    return artifact


class Rig:
    """One context of the engine with everything a decode step of one row needs set, for a test to spoil."""

    def __init__(self, artifact: Artifact) -> None:
        self.sim = SimCuda()
        self.cuda = Cuda(self.sim)
        plan = plan_of(artifact)
        assert plan.info is not None
        self.loaded = LoadedPlan(TrtLibrary(TARGET, SimTensorRT(self.sim), VERSION), plan.path, plan.info)
        self.scratch = self.cuda.allocate(self.loaded.scratch_bytes, "x")
        self.context = self.loaded.context(PROFILES[0], self.cuda, self.scratch)
        for name in ("input_ids", "position_ids", "write_idx", "logits_idx"):
            block = self.cuda.allocate(8, name)
            self.cuda.clear(block.address, 8)
            self.context.set_input(name, block.address, (1, 1) if name.endswith("_ids") else (1,))
        for name, size in (("logits", 320 * 4), ("top_logits", 256), ("top_ids", 512), ("log_sum", 4)):
            self.context.set_output(name, self.cuda.allocate(size, name).address)
        self.caches: dict[str, int] = {}
        for layer in range(3):
            for kv in "kv":
                address = self.cuda.allocate(2 * CAPACITY * 16 * 4, "cache").address
                self.cuda.clear(address, 2 * CAPACITY * 16 * 4)
                self.set_cache(self.context, f"{layer}.{kv}", address)
        self.cuda.synchronize()

    def set_cache(self, context: ProfileContext, name: str, address: int) -> None:
        context.set_input(f"past.{name}", address, (1, 2, CAPACITY, 16))
        context.set_output(f"present.{name}", address)
        self.caches[name] = address


class TestTensorRT:
    @pytest.fixture
    def rig(self, tiny: Artifact) -> Rig:
        return Rig(tiny)

    def test_what_is_right_runs(self, rig: Rig) -> None:
        rig.context.enqueue()
        rig.cuda.synchronize()

    def test_an_address_that_is_not_set(self, rig: Rig) -> None:
        fresh = rig.loaded.context("decode", rig.cuda, rig.scratch)
        with pytest.raises(MisuseError, match="the shape of input_ids is not set"):
            fresh.enqueue()
        fresh._context._shapes = dict(rig.context._context._shapes)
        with pytest.raises(MisuseError, match="the address of input_ids is not set"):
            fresh.enqueue()

    def test_a_shape_outside_the_profile(self, rig: Rig) -> None:
        with pytest.raises(MisuseError, match="3 is not in the profile's 1 to 2"):
            rig.context.set_input("write_idx", rig.caches["0.k"], (3,))
        with pytest.raises(MisuseError, match="dimensions"):
            rig.context.set_input("write_idx", rig.caches["0.k"], (1, 1))

    def test_shapes_that_do_not_agree(self, rig: Rig) -> None:
        rig.context.set_input("write_idx", rig.cuda.allocate(16, "x").address, (2,))
        with pytest.raises(MisuseError, match="B is 1 and, in write_idx, 2"):
            rig.context.enqueue()

    def test_a_broken_alias(self, rig: Rig) -> None:
        rig.context.set_output("present.1.v", rig.cuda.allocate(2 * CAPACITY * 16 * 4, "x").address)
        with pytest.raises(MisuseError, match=r"present\.1\.v is not at the address of past\.1\.v"):
            rig.context.enqueue()

    def test_outputs_that_overlap(self, rig: Rig) -> None:
        rig.context.set_output("log_sum", rig.caches["0.k"] + 256)
        with pytest.raises(MisuseError, match="overlap"):
            rig.context.enqueue()

    def test_an_unaligned_address(self, rig: Rig) -> None:
        with pytest.raises(MisuseError, match="not a multiple of 256"):
            rig.context.set_output("logits", rig.caches["0.k"] + 4)

    def test_memory_too_short_for_its_tensor(self, rig: Rig) -> None:
        rig.context.set_output("logits", rig.cuda.allocate(100, "x").address)
        with pytest.raises(MisuseError, match="run out of their block"):
            rig.context.enqueue()

    def test_activations_without_memory(self, rig: Rig) -> None:
        rig.scratch.free()
        with pytest.raises(MisuseError, match="freed"):
            rig.context.enqueue()

    def test_a_graph_of_a_context_that_changed(self, rig: Rig) -> None:
        rig.cuda.begin_capture()
        with pytest.raises(MisuseError, match="captured before a run"):
            rig.context.enqueue()
        rig.cuda.end_capture().free()
        rig.context.enqueue()
        rig.cuda.begin_capture()
        rig.context.enqueue()
        graph = rig.cuda.end_capture()
        graph.launch()
        rig.cuda.synchronize()
        rig.context.set_input("write_idx", rig.cuda.allocate(16, "x").address, (2,))
        graph.launch()
        with pytest.raises(MisuseError, match="shapes of its context changed"):
            rig.cuda.synchronize()

    def test_tokens_behind_the_slot(self, rig: Rig) -> None:
        host = rig.cuda.allocate_pinned(8, "x")
        host.view(np.int64, (1,))[0] = CAPACITY
        place = rig.cuda.allocate(8, "x")
        rig.cuda.copy_in(place.address, host.address, 8)
        rig.context.set_input("write_idx", place.address, (1,))
        rig.context.enqueue()
        with pytest.raises(MisuseError, match="a slot has 128"):
            rig.cuda.synchronize()

    def test_a_profile_not_waited_for(self, rig: Rig) -> None:
        context = rig.loaded.engine.create_execution_context(
            sim_tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        assert context.set_optimization_profile_async(0, rig.cuda.stream_handle)
        with pytest.raises(MisuseError, match="before that was waited for"):
            context.set_input_shape("write_idx", (1,))


def test_the_doubles_name_nothing_that_is_not_checked() -> None:
    """Every public class of the double of TensorRT that stands for a real one is in the comparisons above."""
    classes = {name for name, value in vars(sim_tensorrt).items() if inspect.isclass(value)}
    own = {name for name in classes if getattr(sim_tensorrt, name).__module__ == sim_tensorrt.__name__}
    checked = {*TRT_CLASSES, *TRT_ENUMS, "Severity", "ILogger"}
    assert own - checked == {"SimTensorRT", "Tensor", "_RuntimeBefore"}
