"""Adds a graph of another dialect to an artifact, by exporting its checkpoint again with the same settings.

The new graph is verified like any other, so the checkpoint is needed. The manifest names it, but does not hold the path
of a local one. The artifact's own calibration is reused.
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

_NO_LIMIT = 0.999
"""Perplexity increase: only the layers that took two passes before take them again."""


def add_graph(artifact: Artifact, dialect: str, *, model: str | None) -> Artifact:
    """The artifact, exported again with `dialect` besides its own. If that fails, the old artifact stays.

    model: the checkpoint; needed where the manifest does not say where it is
    InvalidSetting if the checkpoint is unknown or another one, InvalidArtifact for an artifact that cannot have the
    graph; also the errors of an export.
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
    """Arguments of `open_checkpoint`: model and revision. InvalidSetting if the checkpoint is not known."""
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
    wrong = f"--model {model} is not the checkpoint" if model else "its checkpoint's path is not recorded"
    raise InvalidSetting(
        f"{artifact.path} has no {dialect_name(dialect)} graph, and {wrong} ({manifest.source}); give its "
        f"path with --model, or export it with --dialect {dialects}: headrace export "
        f"PATH/TO/{manifest.source} --precision {manifest.precision} --dialect {dialects} --max-len "
        f"{manifest.dims.max_len} --out {path} --replace"
    )


def _quantization(artifact: Artifact) -> QuantizationOptions:
    """The artifact's own calibration, and the layers that took two passes."""
    if CALIBRATION not in artifact.manifest.files:
        return QuantizationOptions()
    two_pass = artifact.receipt.get("quantization", {}).get("two_pass")
    int8 = Int8Options() if two_pass is None else Int8Options(max_ppl_increase=_NO_LIMIT, keep=tuple(two_pass))
    return QuantizationOptions(reuse=artifact.path, int8=int8)


def _limits(artifact: Artifact) -> dict[str, float]:
    """The limits that the user set with --gate."""
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
    """The artifact with the table by which its precision was chosen."""
    write_whole(artifact.path / CHOICE, choice)
    entry = file_entry(artifact.path / CHOICE)
    manifest = replace(artifact.manifest, files={**artifact.manifest.files, CHOICE: entry})
    write_manifest(artifact.path, manifest)
    return replace(artifact, manifest=manifest)
