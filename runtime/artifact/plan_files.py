"""The TensorRT plans of an artifact: which there are, what each was built for, whether it is whole.

A plan is the file of what TensorRT calls an engine. In our code an engine is the serving loop; users know plans by the
folder `engines/` and the verb `headrace engine`.

    engines/<target>-<gpus>-<version>-<key>.plan    the library's own format, see export/tensorrt/build.py
    engines/<the same>.json                         this module's `PlanInfo`, listed in the manifest with its hash

A plan serves only the target, library version, GPUs, graph and weights it was built from; all of them are in the key.
Reading only: nothing here loads a plan, and no TensorRT is imported.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.artifact.json_shape import parse_json, shaped
from runtime.artifact.known_hashes import sha256_of
from runtime.artifact.manifest import MANIFEST, Artifact, FileEntry, Manifest, read_manifest
from runtime.errors import InvalidArtifact, InvalidPlan

ENGINES = "engines"
TARGETS = ("tensorrt-rtx", "tensorrt")
PROFILES = ("decode", "prefill", "verify")
"""In the order of the plan's profile indices."""
PLAN_SCHEMA = 1


class Span(NamedTuple):
    """Smallest size of a dimension, the one it is tuned for, and the largest."""

    low: int
    best: int
    high: int


class Shape(NamedTuple):
    """The sizes of one run, by the graph's symbolic dimensions (export/graph/portable/decoder.py)."""

    rows: int  # B
    tokens: int  # S, of each row
    logits: int  # R, positions whose logits are wanted
    capacity: int  # of a cache slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One optimization profile: a box of shapes. decode has one token a row, verify a few, prefill a chunk."""

    name: str
    rows: Span
    tokens: Span
    logits: Span
    capacity: Span

    def holds(self, shape: Shape) -> bool:
        """Whether a run of these sizes lies inside."""
        return all(
            getattr(self, name).low <= size <= getattr(self, name).high for name, size in shape._asdict().items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanIdentity:
    """All that makes two plans differ.

    version: of the library, as it gives it; gpus: compute capabilities, like sm86
    device: name of the one GPU a plan of `tensorrt` was built on; such plans run on no other model
    graph, weights: sha256 of the ONNX file, and of each file that holds its weights
    """

    target: str
    version: str
    gpus: tuple[str, ...]
    device: str | None
    dialect: str
    graph: str
    weights: Mapping[str, str]
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """Twelve hex digits of everything here."""
        parts = {name: getattr(self, name) for name in PlanIdentity.__dataclass_fields__}
        plain = {**parts, "profiles": [asdict(profile) for profile in self.profiles]}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def stem(self) -> str:
        """File name of the plan and its .json, without the ending."""
        return f"{self.target}-{'+'.join(self.gpus)}-{self.version}-{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInfo(PlanIdentity):
    """What a plan was built from and for; the .json beside its plan.

    layers: how many attention, kv_cache_update, quantize and dequantize layers the parsed network had
    build: seconds, predicted and measured peak bytes, weight bytes
    """

    plan: FileEntry
    layers: Mapping[str, int]
    build: Mapping[str, float]

    @property
    def max_batch(self) -> int:
        return self.profile("decode").rows.high

    @property
    def max_len(self) -> int:
        """Most tokens a cache slot may hold."""
        return self.profile("decode").capacity.high

    @property
    def prefill_chunk(self) -> int:
        return self.profile("prefill").tokens.high

    @property
    def verify_tokens(self) -> int:
        """Most tokens of a row in one speculative verification: the drafted ones, and the one before them."""
        return self.profile("verify").tokens.high

    def profile(self, name: str) -> Profile:
        """One of PROFILES."""
        return self.profiles[PROFILES.index(name)]

    def to_json(self) -> str:
        return json.dumps({"schema_version": PLAN_SCHEMA, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "PlanInfo":
        """Parse and check; InvalidPlan says what is wrong."""
        try:
            raw = parse_json(text, where)
            version = raw.get("schema_version") if isinstance(raw, dict) else None
            if version != PLAN_SCHEMA:
                raise InvalidPlan(f"{where} has schema version {version!r}, this release reads {PLAN_SCHEMA}")
            info = shaped(raw, cls, where)
        except InvalidPlan:
            raise
        except InvalidArtifact as error:
            raise InvalidPlan(f"{error}; build the engine again") from error
        if tuple(profile.name for profile in info.profiles) != PROFILES or info.target not in TARGETS:
            raise InvalidPlan(f"{where} is malformed: profiles or target are unknown; build the engine again")
        return info


class PlanFile(NamedTuple):
    """A plan of an artifact. `problem` says why it cannot be used; `info` is None where its .json cannot be read."""

    path: Path
    info: PlanInfo | None
    problem: str | None


def plans_of(artifact: Artifact, *, check_hashes: bool = False) -> Iterator[PlanFile]:
    """Every plan in an artifact's `engines/`, by name; sizes are compared, the plans' hashes only on request.

    The manifest is read again: a plan may have been built since the artifact was opened.
    """
    plans = sorted((artifact.path / ENGINES).glob("*.plan"))
    listed = read_manifest(artifact.path).engines if plans else {}
    for path in plans:
        info: PlanInfo | None = None
        try:
            info = read_plan_info(path, listed)
            _check_origin(info, artifact, path)
            _check_plan(path, info, check_hash=check_hashes)
        except InvalidPlan as error:
            yield PlanFile(path, info, str(error))
        else:
            yield PlanFile(path, info, None)


def read_plan_info(plan: Path, listed: Mapping[str, FileEntry]) -> PlanInfo:
    """The .json beside a plan. InvalidPlan if it is missing, malformed, another plan's, or not what is `listed`."""
    file = plan.with_suffix(".json")
    try:
        data = file.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPlan(f"{plan} has no readable {file.name} beside it: {error}; build the engine again") from error
    entry = listed.get(file.name)
    if entry is None or entry.sha256 != hashlib.sha256(data).hexdigest():
        what = "does not list it" if entry is None else "lists it with another hash"
        raise InvalidPlan(f"{file} is not used: {MANIFEST} {what}; build the engine again")
    info = PlanInfo.from_json(text, str(file))
    if info.stem != plan.stem:
        raise InvalidPlan(f"{file} describes {info.stem}, another engine than its name says; build the engine again")
    return info


def find_plan(artifact: Artifact, *, target: str, version: str, gpu: str, device: str | None = None) -> PlanFile:
    """A whole plan for this library and GPU, the one with the largest batch, then the longest slots, if several fit.

    version: the library's own, compared exactly; gpu: like sm86; device: the GPU's name, which decides for plans of
    `tensorrt`. The plan's hash is checked. InvalidPlan says what there is instead, and how to build one.
    """
    found = list(plans_of(artifact))
    fitting = [
        (plan.info.max_batch, plan.info.max_len, plan)
        for plan in found
        if plan.info is not None
        and plan.problem is None
        and (plan.info.target, plan.info.version) == (target, version)
        and gpu in plan.info.gpus
        and plan.info.device in (None, device)
    ]
    if not fitting:
        there = "; ".join(plan.problem or plan.path.name for plan in found) or "none at all"
        raise InvalidPlan(
            f"{artifact.path} has no engine for {target} {version} on {gpu}"
            f"{f' ({device})' if device else ''}, there is: {there}; "
            f"`headrace engine {artifact.path} --target {target} --gpu {gpu}` builds one"
        )
    plan = max(fitting)[2]
    assert plan.info is not None
    check_plan(plan.path, plan.info)
    return plan


def check_plan(plan: Path, info: PlanInfo) -> None:
    """InvalidPlan unless the plan has the size and the sha256 it was written with."""
    _check_plan(plan, info, check_hash=True)


def weight_files(manifest: Manifest) -> Mapping[str, str]:
    """sha256 of the artifact's weight files, by name."""
    return {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".bin")}


def largest_plan(artifact: Artifact) -> int | None:
    """Bytes of the largest usable plan; None if there is none."""
    return max((plan.info.plan.size for plan in plans_of(artifact) if plan.info and not plan.problem), default=None)


def device_weight_bytes(artifact: Artifact) -> int:
    """Bytes that the artifact's weights take on a GPU: its largest usable plan, or else its weight files."""
    return largest_plan(artifact) or sum(
        entry.size for name, entry in artifact.manifest.files.items() if name.endswith(".bin")
    )


def _check_origin(info: PlanInfo, artifact: Artifact, plan: Path) -> None:
    manifest = artifact.manifest
    graph = manifest.files.get(manifest.dialects.get(info.dialect, ""))
    if graph is None or graph.sha256 != info.graph or info.weights != weight_files(manifest):
        raise InvalidPlan(f"{plan} was built from another export of the model; build the engine again")


def _check_plan(plan: Path, info: PlanInfo, *, check_hash: bool) -> None:
    size = plan.stat().st_size
    if size != info.plan.size:
        raise InvalidPlan(f"{plan} has {size:,} bytes, its .json says {info.plan.size:,}; build the engine again")
    if check_hash and (found := sha256_of(plan)) != info.plan.sha256:
        raise InvalidPlan(
            f"{plan} has changed: sha256 {found[:12]}..., its .json says {info.plan.sha256[:12]}...; "
            "build the engine again"
        )
