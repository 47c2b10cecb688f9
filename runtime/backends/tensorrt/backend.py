"""TensorRT, or TensorRT-RTX, on an NVIDIA GPU: runs the plans that `headrace engine` built into the artifact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.artifact.plan_files import TARGETS
from runtime.backends.backend import Backend, Problem
from runtime.backends.environment import Environment, load_cuda
from runtime.backends.nvidia import CUDA_OF_WHEELS, driver_problems, no_gpu, python_problems
from runtime.backends.tensorrt.library import TrtLibrary, open_library
from runtime.errors import DeviceUnavailable, HeadraceError, InvalidSetting

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.artifact.plan_files import PlanFile
    from runtime.backends.cuda.cuda import Cuda
    from runtime.session.session import Session
    from runtime.settings import EngineSettings

_TENSORRT_OF_JETPACK = {"5": "8.5", "6": "10.3"}
"""What JetPack ships; JetPack 7 takes the wheels for servers with Arm processors."""


@dataclass(frozen=True)
class TensorRt(Backend):
    """`open_cuda` and `open_trt` can be replaced by doubles."""

    name = "tensorrt"
    summary = "TensorRT on an NVIDIA GPU"
    packages = ("tensorrt", "tensorrt-rtx", "cuda-python", "cuda-bindings")
    dialects = ("trt", "trt-plain")

    open_cuda: "Callable[[], Cuda]" = load_cuda
    open_trt: Callable[[str], TrtLibrary] = open_library

    def missing_hardware(self, env: Environment) -> Problem | None:
        return no_gpu(env)

    def missing_software(self, env: Environment) -> Iterator[Problem]:
        if env.jetson is not None and env.jetson.jetpack == "5":
            yield Problem("JetPack 5 ships TensorRT 8.5, 10.3 is the first that will do", "flash JetPack 6")
        loaded, refusals = self._libraries()
        problems = [Problem("; ".join(refusals), _install(env))] if not loaded else []
        problems += python_problems(env)
        if "tensorrt-rtx" in env.packages and [library.target for library in loaded] == ["tensorrt-rtx"]:
            problems += driver_problems(env, "tensorrt-rtx", CUDA_OF_WHEELS)
        yield from problems
        if not problems and env.has_nvidia_device and isinstance(env.cuda_device, str):
            yield Problem(env.cuda_device, "look at dmesg and nvidia-smi; the driver may need a restart")

    def note(self, env: Environment) -> str:
        loaded, _ = self._libraries()
        return ", ".join(f"{library.target} {library.version} ({library.dialect} graphs)" for library in loaded)

    def open(self, artifact: "Artifact", settings: "EngineSettings") -> "Session":
        """On the first installed library for which the artifact has a plan for this GPU."""
        from runtime.backends.tensorrt.session import TrtSession
        from runtime.machine.memory import ALONE
        from runtime.settings import share_of

        cuda = self.open_cuda()
        try:
            library, plan = self._find_plan(artifact, cuda)
            capacity = _check_limits(artifact, settings, plan)
        except BaseException:
            cuda.close()
            raise
        return TrtSession.open(
            artifact,
            plan,
            library=library,
            cuda=cuda,
            max_batch=settings.max_batch,
            capacity=capacity,
            kv_memory=settings.kv_memory,
            share=share_of(settings) or ALONE,
        )

    def _libraries(self) -> tuple[list[TrtLibrary], list[str]]:
        """The libraries that load, and why the others do not."""
        loaded, refusals = [], []
        for target in TARGETS:
            try:
                loaded.append(self.open_trt(target))
            except HeadraceError as error:
                refusals.append(str(error))
        return loaded, refusals

    def _find_plan(self, artifact: "Artifact", cuda: "Cuda") -> "tuple[TrtLibrary, PlanFile]":
        from runtime.artifact.plan_files import find_plan

        gpu, device = cuda.capability(), cuda.device_name()
        problems = []
        for target in TARGETS:
            try:
                library = self.open_trt(target)
                return library, find_plan(artifact, target=target, version=library.version, gpu=gpu, device=device)
            except HeadraceError as error:
                problems.append(str(error))
        raise DeviceUnavailable("; ".join(problems))


def _check_limits(artifact: "Artifact", settings: "EngineSettings", plan: "PlanFile") -> int:
    """Tokens of a slot; InvalidSetting if chunks are longer than the plan takes."""
    assert plan.info is not None
    if settings.prefill_chunk is not None and settings.prefill_chunk > plan.info.prefill_chunk:
        raise InvalidSetting(
            f"--prefill-chunk {settings.prefill_chunk} is beyond the {plan.info.prefill_chunk} tokens that "
            f"{plan.info.stem} was built for; lower it, or build an engine with a larger --prefill-chunk"
        )
    return settings.max_len or min(artifact.manifest.dims.max_len, plan.info.max_len)


def _install(env: Environment) -> str:
    if env.jetson is not None and env.jetson.jetpack in _TENSORRT_OF_JETPACK:
        return "apt install python3-libnvinfer, and a virtual environment made with --system-site-packages"
    if env.jetson is not None:
        return "pip install 'headrace[tensorrt]'"
    return "pip install 'headrace[rtx]'"
