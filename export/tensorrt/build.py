"""Graph to plan: one code path for `tensorrt` and `tensorrt_rtx`.

    read and hash the graph -> derive the profiles -> is it there already? -> does it fit in memory? -> parse and
    check the network -> build -> is it a plan? -> write

Strongly typed networks: the types are those of the ONNX file, and nothing here changes them.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from export.tensorrt.gpus import chosen_gpus
from export.tensorrt.memory import check_fits, growth, predicted_peak
from export.tensorrt.network import Graph, attentions, check_network, parse_network, read_graph
from export.tensorrt.profiles import PlanLimits, derive_profiles, input_shape
from export.tensorrt.progress import Monitor, progress_monitor
from export.tensorrt.store import list_files, plan_directory, write_plan_files
from export.tensorrt.timings import attach_timings, keep_timings, timings_file
from runtime.artifact.manifest import Artifact, FileEntry, Manifest, read_manifest
from runtime.artifact.plan_files import (
    ENGINES,
    PlanIdentity,
    PlanInfo,
    check_plan,
    read_plan_info,
    weight_files,
)
from runtime.backends.tensorrt.library import TrtLibrary, TrtLogger, open_library
from runtime.errors import InvalidPlan, PlanBuildFailed
from runtime.machine.progress import progress_bar

SMALLEST_SHARE = 0.9
"""Smallest complete plan, as a share of the weight bytes. A plan holds all weights in their own width: SmolLM2-135M's
plans have the weights, the tied embedding once more, and 7 MB, in fp16, int8 and int4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """target: of TARGETS; gpus: like sm86, empty for the target's own; rebuild: although the plan is there."""

    target: str = "tensorrt-rtx"
    gpus: tuple[str, ...] = ()
    limits: PlanLimits = field(default_factory=PlanLimits)
    rebuild: bool = False


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """The plan's path and description; `is_new` is False where it was there already."""

    path: Path
    info: PlanInfo
    is_new: bool


def build_plan(artifact: Artifact, options: PlanOptions) -> BuiltPlan:
    """Build the plan of an artifact, or find it built. The artifact's hashes must have been checked.

    InvalidSetting for a target, GPU or limit that cannot be; InvalidArtifact for a graph that is missing or not the
    checked one; PlanBuildFailed where TensorRT refuses it, loses a part of it or gives no plan.
    """
    library = open_library(options.target)
    gpus, device = chosen_gpus(library, options.gpus)
    graph = read_graph(artifact, wanted_dialect(library, artifact))
    identity = PlanIdentity(
        target=library.target,
        version=library.version,
        gpus=gpus,
        device=device,
        dialect=graph.dialect,
        graph=graph.sha256,
        weights=weight_files(artifact.manifest),
        profiles=derive_profiles(options.limits, artifact.manifest.dims),
    )
    known = artifact.path / ENGINES / f"{identity.stem}.plan"
    if not options.rebuild and (info := _whole(artifact, known)) is not None:
        return BuiltPlan(known, info, is_new=False)
    predicted = predicted_peak(graph.weight_bytes)
    check_fits(predicted, graph.weight_bytes)
    directory = plan_directory(artifact)
    started_s = time.monotonic()
    with growth() as peak:
        plan, layers = _compile(library, identity, graph, artifact, timings_file(directory, identity))
    check_plausible(library, plan, graph)
    info = PlanInfo(
        **{item.name: getattr(identity, item.name) for item in fields(identity)},
        plan=FileEntry(size=len(plan), sha256=hashlib.sha256(plan).hexdigest()),
        layers=layers,
        build={
            "seconds": round(time.monotonic() - started_s, 2),
            "predicted_peak_bytes": predicted,
            "peak_bytes": peak(),
            "weight_bytes": graph.weight_bytes,
        },
    )
    return BuiltPlan(write_plan_files(artifact, info, plan), info, is_new=True)


def check_plausible(library: TrtLibrary, plan: bytes | None, graph: Graph) -> None:
    """PlanBuildFailed unless the builder's result is large enough, and an engine that the library accepts."""
    if not plan:
        raise PlanBuildFailed(f"{library.target} {library.version} ended without an engine and gave no reason")
    if len(plan) < SMALLEST_SHARE * graph.weight_bytes:
        raise PlanBuildFailed(
            f"{library.target} {library.version} gave an engine of {len(plan):,} bytes for {graph.weight_bytes:,} "
            "bytes of weights: a part is missing, and it is not kept"
        )
    if defects := library.plan_defects(plan):
        raise PlanBuildFailed(
            f"{library.target} {library.version} calls its own engine {', '.join(defects)}; it is not kept"
        )


def wanted_dialect(library: TrtLibrary, artifact: Artifact) -> str:
    """The dialect to compile: the library's own, or `trt-plain`, which every release takes, if only that is there."""
    there = artifact.manifest.dialects
    return next((dialect for dialect in (library.dialect, "trt-plain") if dialect in there), library.dialect)


def _whole(artifact: Artifact, plan: Path) -> PlanInfo | None:
    """The description of an existing plan; None unless the manifest lists it and it is intact."""
    if not plan.is_file():
        return None
    try:
        info = read_plan_info(plan, read_manifest(artifact.path).engines)
        check_plan(plan, info)
    except InvalidPlan:
        return None
    return info


def _compile(
    library: TrtLibrary, identity: PlanIdentity, graph: Graph, artifact: Artifact, timings: Path
) -> tuple[bytes, Mapping[str, int]]:
    """The plan's bytes and how many layers of each kind the network had."""
    logger = library.logger()
    builder = _new_builder(library, logger)
    config = builder.create_builder_config()
    _choose_gpus(library, config, identity)
    capacity = identity.profiles[0].capacity.high
    network, parser = parse_network(library, logger, builder, graph, capacity)
    layers = check_network(library, network, graph)
    for attention in attentions(library, network):
        # Where no fused kernel fits (float32, odd head sizes) it is taken apart; without leave, the build fails.
        attention.decomposable = True
    _add_profiles(builder, config, network, identity, artifact.manifest)
    if library.keeps_timings:
        attach_timings(config, timings, read_manifest(artifact.path).engines.get(timings.name))
    plan = _serialize(library, logger, builder, network, config)
    del parser  # it owned the weights until here
    if library.keeps_timings:
        keep_timings(config, timings)
        list_files(artifact, *filter(Path.is_file, (timings,)))
    return plan, layers


def _new_builder(library: TrtLibrary, logger: TrtLogger) -> Any:
    try:
        return library.module.Builder(logger.inner)
    except (TypeError, RuntimeError) as error:  # the bindings raise these if the constructor returns nothing
        reason = logger.errors[-1] if logger.errors else str(error).partition("\n")[0]
        raise PlanBuildFailed(
            f"{library.target} {library.version} cannot start on this machine: {reason}; "
            "`--target tensorrt` builds on the GPU it is for, `--target tensorrt-rtx` on any machine"
        ) from error


def _choose_gpus(library: TrtLibrary, config: Any, identity: PlanIdentity) -> None:
    if not library.compiles_ahead:
        return
    kinds = library.module.ComputeCapability
    config.num_compute_capabilities = len(identity.gpus)
    for idx, gpu in enumerate(identity.gpus):
        config.set_compute_capability(getattr(kinds, gpu.upper()), idx)


def _add_profiles(builder: Any, config: Any, network: Any, identity: PlanIdentity, manifest: Manifest) -> None:
    names = [network.get_input(idx).name for idx in range(network.num_inputs)]
    for profile in identity.profiles:
        shapes = builder.create_optimization_profile()
        for name in names:
            shapes.set_shape(
                name, *(input_shape(name, manifest.dims, profile, end, manifest.states) for end in range(3))
            )
        if config.add_optimization_profile(shapes) < 0:
            raise PlanBuildFailed(f"{identity.target} {identity.version} refuses the {profile.name} profile")


def _serialize(library: TrtLibrary, logger: TrtLogger, builder: Any, network: Any, config: Any) -> bytes:
    """Build, with a bar; PlanBuildFailed with the library's first error if it gives nothing."""
    with progress_bar("engine", total=100, unit="%") as bar:
        monitor = Monitor(bar.update)
        config.progress_monitor = progress_monitor(library.module, monitor)
        built = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if built is None:
        reason = logger.errors[0] if logger.errors else "no reason given"
        raise PlanBuildFailed(f"{library.target} {library.version} gave no engine: {reason}")
    return bytes(built)
