"""A TensorRT plan on the device: loaded, or refused with the reason; and its execution contexts, one a profile.

Only what `tensorrt` and `tensorrt_rtx` have in common is called; where one has more, it is asked whether it has. The
library is handed in, so that tests can hand in a double (tests/support/simulated/tensorrt.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.artifact.plan_files import PROFILES, PlanInfo, Shape
from runtime.backends.cuda.cuda import Cuda, DeviceMemory
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.errors import DeviceFailed, DeviceOutOfMemory, InvalidPlan

_SAID_OF_INVALID = {
    "VERSION_MISMATCH": "it was built by another version of the library",
    "UNSUPPORTED_CC": "it was built for other GPUs",
    "OLD_CUDA_DRIVER": "it needs a newer driver",
    "OLD_CUDA_RUNTIME": "it needs a newer CUDA runtime",
    "INSUFFICIENT_GPU_MEMORY": "the device has not enough free memory",
    "MALFORMED_ENGINE": "it is truncated or not a plan",
    "CUDA_ERROR": "CUDA failed while it was examined",
}


class LoadedPlan:
    """A deserialized plan. InvalidPlan says why it cannot be used, DeviceOutOfMemory that it does not fit."""

    def __init__(self, library: TrtLibrary, plan: Path, info: PlanInfo) -> None:
        self._trt, self.info = library.module, info
        self._logger = library.logger()
        self._runtime = self._trt.Runtime(self._logger.inner)
        data = plan.read_bytes()
        self._check_validity(data, plan)
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise self._refusal(plan)
        if self.engine.num_optimization_profiles != len(PROFILES):
            raise InvalidPlan(
                f"{plan} has {self.engine.num_optimization_profiles} profiles, not {len(PROFILES)}; build it again"
            )

    @property
    def scratch_bytes(self) -> int:
        """Memory that a run needs for its activations, whatever the profile."""
        return int(self.engine.device_memory_size_v2)

    def is_aliased(self, names: Mapping[str, str]) -> bool:
        """Whether every output in `names` is written in place of the input beside it."""
        return all(self.engine.get_aliased_input_tensor(present) == past for present, past in names.items())

    def close(self) -> None:
        """Let go of the engine, and with it of its weights on the device, once no context uses it. Idempotent."""
        self.engine = self._runtime = None

    def last_error(self) -> str:
        """What the library said last when it failed."""
        return self._logger.errors[-1] if self._logger.errors else "it gives no reason"

    def context(self, profile: str, cuda: Cuda, scratch: DeviceMemory) -> "ProfileContext":
        """A context for one profile. All share the scratch memory: they run one after another, on one stream."""
        context = self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise DeviceFailed(f"TensorRT made no execution context for {profile}: {self.last_error()}")
        context.set_device_memory(scratch.address, scratch.num_bytes)
        if not context.set_optimization_profile_async(PROFILES.index(profile), cuda.stream_handle):
            raise DeviceFailed(f"TensorRT did not take the profile {profile}: {self.last_error()}")
        cuda.synchronize()
        return ProfileContext(context, profile, cuda, self)

    def profile_for(self, shape: Shape) -> str:
        """The first profile that holds a run of these sizes; InvalidPlan names the sizes if none does."""
        for profile in ("decode", "verify", "prefill"):  # the tightest first: it was tuned for the least
            if self.info.profile(profile).holds(shape):
                return profile
        sizes = ", ".join(f"{size} {name}" for name, size in shape._asdict().items())
        raise InvalidPlan(
            f"no profile of {self.info.stem} holds a run of {sizes}: it was built for {self.info.max_batch} rows of "
            f"{self.info.max_len} tokens, {self.info.prefill_chunk} a chunk; build an engine with larger limits"
        )

    def _check_validity(self, data: bytes, plan: Path) -> None:
        """TensorRT-RTX can say what is wrong with a plan before it is loaded; TensorRT only logs it."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(data)
        if validity != self._trt.EngineValidity.INVALID:
            return
        flags = self._trt.EngineInvalidityDiagnostics
        reasons = [text for name, text in _SAID_OF_INVALID.items() if int(diagnostics) & getattr(flags, name).value]
        text = "; ".join(reasons) or self.last_error()
        kind = DeviceOutOfMemory if reasons == [_SAID_OF_INVALID["INSUFFICIENT_GPU_MEMORY"]] else InvalidPlan
        raise kind(f"{plan} cannot be loaded: {text}; build the engine again on or for this device")

    def _refusal(self, plan: Path) -> Exception:
        said = self.last_error()
        if "memory" in said.lower():
            return DeviceOutOfMemory(f"{plan} does not fit the device: {said}")
        return InvalidPlan(
            f"{plan} cannot be loaded: {said}; it may be truncated, or built for another GPU or version: "
            "build the engine again on or for this device"
        )


class ProfileContext:
    """One execution context: addresses and shapes of its tensors, then `enqueue`. Remembers what is set already."""

    def __init__(self, context: Any, profile: str, cuda: Cuda, loaded: LoadedPlan) -> None:
        self.profile = profile
        self._context, self._cuda, self._loaded = context, cuda, loaded
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_input(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Where an input lies, and its shape."""
        if self._shapes.get(name) != shape:
            if not self._context.set_input_shape(name, shape):
                raise InvalidPlan(f"TensorRT refuses shape {shape} of {name}: {self._loaded.last_error()}")
            self._shapes[name] = shape
        self.set_output(name, address)

    def set_output(self, name: str, address: int) -> None:
        """Where a tensor lies."""
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise DeviceFailed(f"TensorRT refuses the address of {name}: {self._loaded.last_error()}")
            self._addresses[name] = address

    def enqueue(self) -> None:
        """Put a run on the stream."""
        if not self._context.execute_async_v3(self._cuda.stream_handle):
            raise DeviceFailed(f"TensorRT failed to run the model: {self._loaded.last_error()}")

    @property
    def is_capturable(self) -> bool:
        """Whether a run can be recorded; TensorRT-RTX may still be compiling kernels, TensorRT always can."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._cuda.stream_handle))
