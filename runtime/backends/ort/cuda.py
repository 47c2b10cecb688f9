"""ONNX Runtime on an NVIDIA GPU, through onnxruntime-gpu, with the KV cache in the GPU's memory.

onnxruntime-gpu 1.31 has no `query_seqlens` input of GroupQueryAttention. The graph is loaded without it, and the
session is not ragged. All but the provider is the same on the CPU, where the tests run it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.backends.backend import Backend, Problem, slots_for
from runtime.backends.environment import Environment, load_cuda, version_numbers
from runtime.backends.nvidia import CUDA_OF_WHEELS, driver_problems, no_gpu, python_problems
from runtime.errors import InvalidArtifact

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.backends.cuda.cuda import Cuda
    from runtime.session.session import Session
    from runtime.settings import EngineSettings

_FLOOR = (1, 31)
_INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'headrace[cuda]'"


@dataclass(frozen=True)
class OrtCuda(Backend):
    """`open_cuda` can be replaced by a double."""

    name = "cuda"
    summary = "ONNX Runtime on an NVIDIA GPU"
    packages = ("onnxruntime-gpu", "cuda-python", "cuda-bindings")
    dialects = ("ort",)

    open_cuda: "Callable[[], Cuda]" = load_cuda

    def missing_hardware(self, env: Environment) -> Problem | None:
        return no_gpu(env)

    def missing_software(self, env: Environment) -> Iterator[Problem]:
        version = env.packages.get("onnxruntime-gpu")
        if env.jetson is not None and env.jetson.jetpack in ("5", "6"):
            yield Problem(
                f"onnxruntime-gpu has no wheels for JetPack {env.jetson.jetpack}", "use --device tensorrt, or cpu"
            )
        elif version is None:
            yield Problem("onnxruntime-gpu is not installed", _INSTALL)
        elif version_numbers(version)[:2] < _FLOOR:
            yield Problem(f"onnxruntime-gpu {version} is too old, 1.31 is the first that will do", _INSTALL)
        elif "onnxruntime" in env.packages:
            what = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
            yield Problem(what, _INSTALL)
        if version is not None:
            yield from driver_problems(env, "onnxruntime-gpu", CUDA_OF_WHEELS)
        yield from python_problems(env)

    def note(self, env: Environment) -> str:
        version = env.packages.get("onnxruntime-gpu")
        return "" if version is None else f"onnxruntime-gpu {version}"

    def check(self, artifact: "Artifact") -> None:
        super().check(artifact)
        dtype = artifact.manifest.kv.dtype
        if dtype not in ("float16", "bfloat16"):
            raise InvalidArtifact(
                f"{artifact.path} computes in {dtype}: ONNX Runtime's attention on CUDA takes half precision alone; "
                "export it with --precision fp16"
            )

    def open(self, artifact: "Artifact", settings: "EngineSettings") -> "Session":
        from runtime.backends.ort.graph import CUDA_PROVIDER, load_device_graph
        from runtime.backends.ort.session import OrtSession
        from runtime.machine.memory import ALONE
        from runtime.settings import share_of

        cuda = self.open_cuda()
        try:
            graph = load_device_graph(artifact, CUDA_PROVIDER)
            budget = (share_of(settings) or ALONE).of_device(cuda.free_memory())
            num_slots, capacity = slots_for(artifact, settings, budget)
            return OrtSession.on_device(
                graph, artifact, device="cuda", copier=cuda, num_slots=num_slots, capacity=capacity
            )
        except BaseException:
            cuda.close()
            raise
