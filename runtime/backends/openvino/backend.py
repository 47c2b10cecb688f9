"""OpenVINO on the CPU: prompts and large batches run faster than on ONNX Runtime, one request alone slower.

It reads the `ort` graph, so an artifact needs no other. Figures: benchmarks/README.md.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.backends.backend import Backend, Problem, paged_slots
from runtime.backends.environment import Environment
from runtime.errors import InvalidArtifact

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.session.session import Session
    from runtime.settings import EngineSettings

_PRECISIONS = ("fp32", "w8a16", "w4a16", "w8a8")


class OpenVino(Backend):
    """The KV cache is in the machine's memory, as large as what is free allows."""

    name = "openvino"
    summary = "OpenVINO on the CPU"
    packages = ("openvino",)
    dialects = ("ort",)
    flags = frozenset({"threads"})

    def passed_over(self, env: Environment) -> Problem | None:
        """Where it is not installed, what ONNX Runtime lacks is the reason to tell."""
        return next(self.missing_software(env), None)

    def missing_software(self, env: Environment) -> Iterator[Problem]:
        if "openvino" not in env.packages:
            yield Problem("openvino is not installed", "pip install 'headrace[openvino]'")

    def check(self, artifact: "Artifact") -> None:
        super().check(artifact)
        precision, cache = artifact.manifest.precision, artifact.manifest.kv.dtype
        if precision not in _PRECISIONS or cache != "float32":
            what = f"{precision}, {cache} KV cache"
            raise InvalidArtifact(
                f"{artifact.path} is {what}: --device openvino runs {', '.join(_PRECISIONS)}, each with a float32 KV "
                "cache; export it with one of these, or use --device cpu"
            )

    def open(self, artifact: "Artifact", settings: "EngineSettings") -> "Session":
        from runtime.backends.openvino.session import OpenVinoSession

        num_slots, capacity, budget = paged_slots(artifact, settings)
        return OpenVinoSession.open(
            artifact, num_slots=num_slots, capacity=capacity, kv_budget=budget, threads=settings.threads
        )
