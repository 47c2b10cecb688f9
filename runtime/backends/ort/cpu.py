"""ONNX Runtime on the CPU: the backend that works everywhere."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.backends.backend import Backend, Problem, paged_slots
from runtime.backends.environment import Environment, version_numbers
from runtime.backends.ort.graph import CPU_FLOOR

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.session.session import Session
    from runtime.settings import EngineSettings


class OrtCpu(Backend):
    """The KV cache is in the machine's memory, which is taken as tokens come."""

    name = "cpu"
    summary = "ONNX Runtime on the CPU"
    packages = ("onnxruntime", "onnxruntime-gpu")
    dialects = ("ort",)
    flags = frozenset({"threads", "speculate", "draft"})
    runs_states = True

    def missing_software(self, env: Environment) -> Iterator[Problem]:
        yield from runtime_problems(env, self.packages)

    def open(self, artifact: "Artifact", settings: "EngineSettings") -> "Session":
        from runtime.backends.ort.session import OrtSession

        num_slots, capacity, budget = paged_slots(artifact, settings)
        return OrtSession.open(
            artifact,
            num_slots=num_slots,
            capacity=capacity,
            kv_budget=budget,
            threads=settings.threads,
            is_run_exact=artifact.manifest.kv.dtype != "int8" and (settings.speculate or settings.draft is not None),
        )


def runtime_problems(env: Environment, packages: Sequence[str]) -> Iterator[Problem]:
    """ONNX Runtime is missing, or too old for the CPU. packages: its distributions"""
    found = {name: env.packages[name] for name in packages if name in env.packages}
    if not found:
        yield Problem("onnxruntime is not installed", "pip install 'headrace[cpu]'")
    elif all(version_numbers(version)[:2] < CPU_FLOOR for version in found.values()):
        name, version = next(iter(found.items()))
        floor = ".".join(map(str, CPU_FLOOR))
        yield Problem(
            f"{name} {version} is too old for the CPU, {floor} is the first that will do",
            f"pip uninstall -y {name}; pip install 'headrace[cpu]'",
        )
