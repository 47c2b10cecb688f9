"""ONNX Runtime on the CPU with the native operators of runtime/native/: the fastest where they are built."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.backends.backend import Backend, Problem, paged_slots
from runtime.backends.environment import Environment
from runtime.backends.ort.cpu import runtime_problems
from runtime.native.library import is_built, load_library, variant_of

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.session.session import Session
    from runtime.settings import EngineSettings


def has_native_graph(artifact: "Artifact") -> bool:
    """Whether an artifact can run on the native operators here."""
    return is_built() and "native" in artifact.manifest.dialects


class Native(Backend):
    """The KV cache is in the machine's memory, as large as what is free allows."""

    name = "native"
    summary = "ONNX Runtime on the CPU with operators of our own, after make native"
    packages = ("onnxruntime", "onnxruntime-gpu")
    dialects = ("native",)
    flags = frozenset({"threads", "speculate", "draft"})
    is_extra = True
    runs_states = True

    def passed_over(self, env: Environment) -> Problem | None:
        """Where the operators are not built, nobody wants them."""
        return next(self.missing_software(env), None)

    def missing_software(self, env: Environment) -> Iterator[Problem]:
        yield from runtime_problems(env, self.packages)
        if not is_built():
            yield Problem("the native operators are not built", "make native (it needs g++ or clang++)")

    def note(self, env: Environment) -> str:
        """With the instructions that the operators use."""
        package = super().note(env)
        return f"{package}, {variant_of(load_library())}" if package and is_built() else package

    def open(self, artifact: "Artifact", settings: "EngineSettings") -> "Session":
        from runtime.backends.ort.native_session import NativeSession

        num_slots, capacity, budget = paged_slots(artifact, settings, "native")
        return NativeSession.open_native(
            artifact, num_slots=num_slots, capacity=capacity, kv_budget=budget, threads=settings.threads
        )
