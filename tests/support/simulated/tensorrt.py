"""A strict double of the `tensorrt` module: runs a plan's ONNX file through ONNX Runtime on SimCuda's memory.

A plan is a line of JSON that names the ONNX file and the profiles (`write_plan`). Every misuse raises MisuseError: an
address that is not set, not aligned or too short for its tensor, a shape outside the profile, a cache whose output is
not its input's memory (or, where the graph does not write in place, is), activations without memory, a context used
before its profile is set, a graph captured cold or launched after its context's shapes changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.plan_files import PlanInfo, Profile
from tests.support.simulated.cuda import DeviceBlock, MisuseError, PinnedBlock, SimCuda, Work

VERSION = "1.7.1.116"
SCRATCH_BYTES = 4096
GPUS = ("sm89",)
_NUMPY = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    """Subclassed by the session; must be constructed by name, as pybind11 wants it."""

    Severity = Severity
    is_constructed = False

    def __init__(self) -> None:
        self.is_constructed = True

    def log(self, severity: IntEnum, msg: str) -> None:
        raise MisuseError("a logger without a log method of its own")


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


def write_plan(file: Path, model: Path, info: PlanInfo) -> bytes:
    """Write the double's idea of a plan; its bytes."""
    profiles = [
        {
            "rows": profile.rows[::2],
            "tokens": profile.tokens[::2],
            "logits": profile.logits[::2],
            "capacity": profile.capacity[::2],
        }
        for profile in info.profiles
    ]
    text = json.dumps({"model": str(model), "version": info.version, "gpus": info.gpus, "profiles": profiles})
    file.write_bytes(text.encode() + b"\n")
    return file.read_bytes()


class SimTensorRT:
    """Stands for the module `tensorrt_rtx`. `has_validity` False makes it `tensorrt`, which only logs what is wrong."""

    __version__ = VERSION
    ILogger = ILogger
    EngineValidity = EngineValidity
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda: SimCuda, *, has_validity: bool = True) -> None:
        class BoundRuntime(Runtime if has_validity else _RuntimeBefore):  # type: ignore[misc]  # chosen at run time
            def __init__(self, logger: ILogger) -> None:
                super().__init__(cuda, logger)

        self.Runtime = BoundRuntime
        self.IKVCacheUpdateLayer = object


class _RuntimeBefore:
    """`tensorrt`'s: no verdict on a plan, and the reason in the log."""

    def __init__(self, cuda: SimCuda, logger: ILogger) -> None:
        if not logger.is_constructed:
            raise MisuseError("a logger whose base class was not constructed")
        self._cuda, self._logger = cuda, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        problems = _problems(serialized_engine)
        if problems:
            self._logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: {problems[0].name}")
            return None
        return ICudaEngine(self._cuda, self._logger, json.loads(serialized_engine))


class Runtime(_RuntimeBefore):
    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        problems = _problems(buffer)
        return (EngineValidity.INVALID if problems else EngineValidity.VALID), sum(
            problem.value for problem in problems
        )


def _problems(plan: bytes) -> list[EngineInvalidityDiagnostics]:
    try:
        content = json.loads(plan)
    except ValueError:
        return [EngineInvalidityDiagnostics.MALFORMED_ENGINE]
    found = []
    if content["version"] != VERSION:
        found.append(EngineInvalidityDiagnostics.VERSION_MISMATCH)
    if "sm89" not in content["gpus"]:
        found.append(EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    return found


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph: symbolic sizes by name, fixed ones as numbers."""

    name: str
    dtype: Any
    dims: tuple[str | int, ...]
    is_input: bool


class ICudaEngine:
    def __init__(self, cuda: SimCuda, logger: ILogger, plan: Mapping[str, Any]) -> None:
        import onnx
        import onnxruntime

        self._cuda, self._logger, self._profiles = cuda, logger, plan["profiles"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(plan["model"], options, providers=["CPUExecutionProvider"])
        self._tensors = {
            each.name: Tensor(each.name, _NUMPY[each.type], tuple(each.shape), is_input)
            for group, is_input in ((self._session.get_inputs(), True), (self._session.get_outputs(), False))
            for each in group
        }
        graph = onnx.load(plan["model"], load_external_data=False).graph
        # TensorScatter becomes a KV-cache-update layer, which writes in place.
        self._aliases = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_BYTES

    def get_aliased_input_tensor(self, name: str) -> str:
        return str(self._aliases.get(name, ""))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._tensors[name].dims)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> "IExecutionContext":
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise MisuseError("contexts that allocate for themselves would not be in the session's sums")
        return IExecutionContext(self, self._cuda)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, cuda: SimCuda) -> None:
        self._engine, self._cuda = engine, cuda
        self._scratch: tuple[int, int] | None = None
        self._profile: Mapping[str, list[int]] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._num_changes = 0  # of shapes
        self._warm_at = -1  # the number of changes at the last run that was not captured

    def set_device_memory(self, memory: int, size: int) -> None:
        self._cuda.block_of(memory, size)
        if size < SCRATCH_BYTES:
            raise MisuseError(f"{size} bytes for activations, {SCRATCH_BYTES} are needed")
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        def run() -> None:
            self._profile = self._engine._profiles[profile_index]

        self._cuda.stream_of(stream_handle).put(Work(run, []))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        tensor = self._tensor(name, is_input=True)
        if self._profile is None:
            raise MisuseError("a shape set before the profile is, or before that was waited for")
        if len(shape) != len(tensor.dims):
            raise MisuseError(f"{name} has {len(tensor.dims)} dimensions, not {len(shape)}")
        for dim, size in zip(tensor.dims, shape, strict=True):
            low, high = (dim, dim) if isinstance(dim, int) else self._profile[_SPANS[dim]]
            if not low <= size <= high:
                raise MisuseError(f"shape {shape} of {name}: {size} is not in the profile's {low} to {high}")
        if self._shapes.get(name) != shape:
            self._num_changes += 1
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory % 256:
            raise MisuseError(f"the address of {name} is not a multiple of 256")
        self._tensor(name)
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._cuda.stream_of(stream) is not None

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self._cuda.stream_of(stream_handle)
        sizes = self._sizes()
        ranges = self._ranges(sizes)
        self._check_aliases(ranges)
        if self._scratch is None:
            raise MisuseError("no memory for activations")
        if stream.captured is not None and self._warm_at != self._num_changes:
            raise MisuseError("captured before a run with these shapes that was not")
        if stream.captured is None:
            self._warm_at = self._num_changes
        num_changes, is_captured, scratch = self._num_changes, stream.captured is not None, self._scratch
        blocks: list[DeviceBlock | PinnedBlock] = [self._cuda.block_of(*span) for span in ranges.values()]

        def run() -> None:
            if is_captured and self._num_changes != num_changes:
                raise MisuseError("a graph launched after the shapes of its context changed")
            self._cuda.block_of(*scratch)
            self._execute(sizes, {name: address for name, (address, _) in ranges.items()})

        stream.put(Work(run, [*blocks, self._cuda.block_of(*scratch)]))
        return True

    def _tensor(self, name: str, *, is_input: bool = False) -> Tensor:
        tensor = self._engine._tensors.get(name)
        if tensor is None or (is_input and not tensor.is_input):
            raise MisuseError(f"{name} is no {'input' if is_input else 'tensor'} of the engine")
        return tensor

    def _sizes(self) -> dict[str, int]:
        """Every symbolic size, from the shapes of the inputs, which must agree."""
        sizes: dict[str, int] = {}
        for tensor in self._engine._tensors.values():
            if not tensor.is_input:
                continue
            if tensor.name not in self._shapes:
                raise MisuseError(f"the shape of {tensor.name} is not set")
            for dim, size in zip(tensor.dims, self._shapes[tensor.name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise MisuseError(f"{dim} is {sizes[dim]} and, in {tensor.name}, {size}")
        return sizes

    def _ranges(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Address and bytes of every tensor; all must lie in live memory."""
        ranges = {}
        for tensor in self._engine._tensors.values():
            if tensor.name not in self._addresses:
                raise MisuseError(f"the address of {tensor.name} is not set")
            count = int(np.prod(_shape(tensor, sizes)))
            ranges[tensor.name] = (self._addresses[tensor.name], count * np.dtype(tensor.dtype).itemsize)
            self._cuda.block_of(*ranges[tensor.name])
        return ranges

    def _check_aliases(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        spans = sorted((start, start + size, name) for name, (start, size) in ranges.items())
        for output, source in self._engine._aliases.items():
            if ranges[output] != ranges[source]:
                raise MisuseError(f"{output} is not at the address of {source}, whose cache it updates")
        for (_, end, name), (start, _, other) in pairwise(spans):
            pair = {name, other}
            if start < end and not any(pair == {output, source} for output, source in self._engine._aliases.items()):
                raise MisuseError(f"{name} and {other} overlap")

    def _execute(self, sizes: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        def array(tensor: Tensor) -> NDArray[Any]:
            shape = _shape(tensor, sizes)
            num_bytes = int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
            flat: NDArray[Any] = self._cuda.bytes_at(addresses[tensor.name], num_bytes).view(tensor.dtype)
            return flat.reshape(shape)

        tensors = self._engine._tensors.values()
        feeds = {tensor.name: array(tensor) for tensor in tensors if tensor.is_input}
        capacity, places = sizes["capacity"], feeds["write_idx"] + sizes["S"]
        if (feeds["write_idx"] < 0).any() or (places > capacity).any():
            raise MisuseError(f"tokens written up to {places.max()}, a slot has {capacity}")
        outputs = [tensor for tensor in tensors if not tensor.is_input]
        results = self._engine._session.run([tensor.name for tensor in outputs], feeds)
        for tensor, result in zip(outputs, results, strict=True):
            array(tensor)[...] = result


_SPANS = {"B": "rows", "S": "tokens", "R": "logits", "capacity": "capacity"}


def _shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims)


def profiles_for(*, max_batch: int, chunk: int, capacity: int, verify: int = 1) -> tuple[Profile, ...]:
    """The three profiles an engine has, for these limits."""
    from runtime.artifact.plan_files import Span

    rows, fixed = Span(1, max_batch, max_batch), Span(capacity, capacity, capacity)

    def profile(name: str, tokens: int, logits: int) -> Profile:
        return Profile(
            name=name, rows=rows, tokens=Span(1, tokens, tokens), logits=Span(1, logits, logits), capacity=fixed
        )

    return (
        profile("decode", 1, max_batch),
        profile("prefill", chunk, max(chunk, max_batch)),
        profile("verify", verify, max_batch * verify),
    )
