"""A tiny model on the simulated GPU: exported, its plan written, the real session opened on the doubles."""

from pathlib import Path
from typing import Any

from export.pipeline.export_model import ExportOptions, export_model
from export.tensorrt.store import list_files
from runtime.artifact.known_hashes import sha256_of
from runtime.artifact.manifest import Artifact, FileEntry
from runtime.artifact.plan_files import ENGINES, PlanFile, PlanInfo, find_plan, weight_files
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.backends.tensorrt.session import TrtSession
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.tensorrt import GPUS, VERSION, SimTensorRT, profiles_for, write_plan
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.checkpoint import config_of, write_checkpoint

TARGET = "tensorrt-rtx"
CAPACITY = 128


def export_tiny(
    directory: Path,
    variant: str = "llama",
    precision: str = "fp32",
    dialects: tuple[str, ...] = ("ort", "trt"),
    **changes: Any,
) -> Artifact:
    """A random model of three layers in the dialects that are compared; `changes` are of its config.json."""
    source = write_checkpoint(directory / "checkpoint", config_of(variant, **changes))
    options = ExportOptions(
        model=str(source),
        out=directory / "artifact",
        precision=precision,
        dialects=dialects,
        force=True,
        quantization=FEW_IDS,
    )
    return export_model(options)


def write_plan_files(
    artifact: Artifact,
    *,
    dialect: str = "trt",
    max_batch: int = 8,
    chunk: int = 32,
    capacity: int = CAPACITY,
    verify: int = 1,
    version: str = VERSION,
    gpus: tuple[str, ...] = GPUS,
) -> Path:
    """Write a simulated plan and its .json into the artifact; the plan's path."""
    fields: dict[str, Any] = {
        "target": TARGET,
        "version": version,
        "gpus": gpus,
        "device": None,
        "dialect": dialect,
        "graph": artifact.manifest.files[artifact.manifest.dialects[dialect]].sha256,
        "weights": weight_files(artifact.manifest),
        "profiles": profiles_for(max_batch=max_batch, chunk=chunk, capacity=capacity, verify=verify),
        "layers": {},
        "build": {},
    }
    draft = PlanInfo(plan=FileEntry(size=0, sha256=""), **fields)
    plan = artifact.path / ENGINES / f"{draft.stem}.plan"
    plan.parent.mkdir(exist_ok=True)
    size = len(write_plan(plan, artifact.model_file(dialect), draft))
    info = PlanInfo(plan=FileEntry(size=size, sha256=sha256_of(plan)), **fields)
    plan.with_suffix(".json").write_text(info.to_json())
    list_files(artifact, plan.with_suffix(".json"))
    return plan


def plan_of(artifact: Artifact) -> PlanFile:
    """The plan that the real reader finds for the simulated GPU."""
    return find_plan(artifact, target=TARGET, version=VERSION, gpu=GPUS[0])


def open_simulated(
    artifact: Artifact,
    sim: SimCuda,
    *,
    plan: PlanFile | None = None,
    max_batch: int = 8,
    capacity: int = CAPACITY,
    kv_memory: int | None = None,
    has_validity: bool = True,
) -> TrtSession:
    """The real session on the doubles."""
    library = TrtLibrary(TARGET, SimTensorRT(sim, has_validity=has_validity), VERSION)
    return TrtSession.open(
        artifact,
        plan_of(artifact) if plan is None else plan,
        library=library,
        cuda=Cuda(sim),
        max_batch=max_batch,
        capacity=capacity,
        kv_memory=kv_memory,
    )
