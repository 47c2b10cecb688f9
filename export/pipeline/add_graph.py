"""Gives an artifact a graph that it lacks: exports its checkpoint again, in the same way, with that dialect as well.

The new graph is compared with the checkpoint like any other, so the checkpoint has to be there: the manifest names it,
but for a local one not where it lies. A calibration that the artifact holds is used again.
"""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from export.artifact.identity import identity_of
from export.artifact.writer import file_entry, write_manifest
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from export.quantize.int8.model import Int8Options
from export.quantize.int8.saved import load_calibration
from export.quantize.kv_cache import INT8
from export.sources.open import DEFAULT_MODEL
from export.storage.whole_file import write_whole
from export.verify.references import NUMPY, TRANSFORMERS
from runtime.artifact.manifest import CALIBRATION, CHOICE, Artifact, dialect_name
from runtime.errors import InvalidArtifact, InvalidSetting

_HUB_SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")

_WHATEVER_IT_COSTS = 0.999
"""As a share of perplexity: no layer takes two passes but those that are named, the ones that took them before."""


def add_graph(artifact: Artifact, dialect: str, *, model: str | None) -> Artifact:
    """The artifact, exported again with `dialect` besides its own. What was at its path stays if that fails.

    model: the checkpoint, where the manifest alone does not tell where it is
    InvalidSetting if it is unknown or another, InvalidArtifact for an artifact that cannot have the graph; the errors
    of an export.
    """
    manifest = artifact.manifest
    if manifest.kv.dtype == INT8:
        raise InvalidArtifact(
            f"{artifact.path} has no {dialect_name(dialect)} graph, and TensorRT does not take its int8 KV cache; "
            "export the model without --kv int8"
        )
    source, revision = _source(artifact, dialect, model)
    sys.stdout.write(f"{artifact.path} has no {dialect_name(dialect)} graph: exporting {source} again, with one\n")
    choice = (artifact.path / CHOICE).read_bytes() if CHOICE in manifest.files else None
    options = ExportOptions(
        model=source,
        out=artifact.path,
        precision=manifest.precision,
        max_len=manifest.dims.max_len,
        revision=revision,
        force=not artifact.passed,
        quantization=_quantization(artifact),
        limits=_limits(artifact),
        dialects=(*manifest.dialects, dialect),
        verify=TRANSFORMERS if f" {TRANSFORMERS} " in artifact.receipt.get("reference", "") else NUMPY,
        replaces=True,  # it was found to be the same model
        keeps_calibration=_keeps_calibration(artifact),
    )
    added = export_model(options)
    return added if choice is None else _with_choice(added, choice)


def _source(artifact: Artifact, dialect: str, model: str | None) -> tuple[str, str | None]:
    """The checkpoint as `open_source` takes it, and a hub id's revision. InvalidSetting if that is not known."""
    manifest = artifact.manifest
    if model is None and manifest.origin is None:
        if manifest.source == DEFAULT_MODEL:
            return DEFAULT_MODEL, None
        if (hub := _HUB_SOURCE.fullmatch(manifest.source)) is not None:
            return hub["repo"], hub["revision"] or manifest.commit
    given = manifest.source if model is None else model
    revision = None
    if (hub := _HUB_SOURCE.fullmatch(manifest.source)) is not None and given == hub["repo"]:
        revision = hub["revision"]
    asked = identity_of(given, revision=revision, precision=manifest.precision, has_int8_kv=False)
    is_there = Path(given).expanduser().exists() or revision is not None
    known = replace(asked, source=manifest.source, origin=manifest.origin)
    if is_there and asked.is_same(known):
        return given, revision
    path = shlex.quote(str(artifact.path))
    dialects = ",".join(map(dialect_name, (*manifest.dialects, dialect)))
    wrong = f"--model {model} is not the checkpoint" if model else "where the checkpoint lies is not recorded"
    raise InvalidSetting(
        f"{artifact.path} has no {dialect_name(dialect)} graph, and {wrong} ({manifest.source}); give its "
        f"path with --model, or export it with --dialect {dialects}: headrace export "
        f"PATH/TO/{manifest.source} --precision {manifest.precision} --dialect {dialects} --max-len "
        f"{manifest.dims.max_len} --out {path} --replace"
    )


def _quantization(artifact: Artifact) -> QuantizationOptions:
    """What was calibrated for the artifact, and the layers that took two passes."""
    if CALIBRATION not in artifact.manifest.files:
        return QuantizationOptions()
    two_pass = artifact.receipt.get("quantization", {}).get("two_pass")
    int8 = Int8Options() if two_pass is None else Int8Options(max_ppl_increase=_WHATEVER_IT_COSTS, keep=tuple(two_pass))
    return QuantizationOptions(reuse=artifact.path, int8=int8)


def _limits(artifact: Artifact) -> dict[str, float]:
    """The user's own limits, which the receipt names as such."""
    return {
        check["figure"].rpartition(".")[2]: check["limit"]
        for check in artifact.receipt["checks"]
        if check["reason"].startswith("asked for with --gate")
    }


def _keeps_calibration(artifact: Artifact) -> bool:
    if CALIBRATION not in artifact.manifest.files:
        return False
    return bool(load_calibration(artifact.path, artifact.manifest.dims.vocab_size).sequences)


def _with_choice(artifact: Artifact, choice: bytes) -> Artifact:
    """The table its precision was chosen by, put back."""
    write_whole(artifact.path / CHOICE, choice)
    entry = file_entry(artifact.path / CHOICE)
    manifest = replace(artifact.manifest, files={**artifact.manifest.files, CHOICE: entry})
    write_manifest(artifact.path, manifest)
    return replace(artifact, manifest=manifest)
