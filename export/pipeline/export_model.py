"""Checkpoint to artifact: read, check, calibrate, write, verify, publish. Every export takes this path."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.artifact.identity import Identity, check_replaceable, identity_of
from export.artifact.writer import file_entry, resolved, staged, write_json, write_manifest
from export.checkpoint.lora.adapter import Lora
from export.checkpoint.protocol import Checkpoint
from export.model.checks.model_reading import read_model
from export.model.description import ModelConfig
from export.model.families.architectures import as_described
from export.pipeline.artifact_files import sampler, write_unverified
from export.pipeline.calibrated import (
    CalibrationInput,
    QuantizationOptions,
    calibrated_model,
    kv_calibration,
    remove_workdir,
    workdir_of,
)
from export.pipeline.estimates import estimates_of
from export.pipeline.graph_files import ExportPlan
from export.pipeline.kept_text import without_text
from export.quantize.kv_cache import COMPUTE, INT8, check_kv, scales_of
from export.schemes.registry import IMPORTED, check_dialect, scheme_named
from export.schemes.scheme import Scheme
from export.sources.open import open_checkpoint
from export.verify.gates import check_limits, failure
from export.verify.receipt import verify
from export.verify.references import NUMPY, check_reference, reference_named
from runtime.artifact.json_shape import finite
from runtime.artifact.manifest import DIALECT_FILES, DIALECT_NAMES, RECEIPT, Artifact, kind_of
from runtime.errors import CalibrationFailed, GateFailed, InvalidSetting
from runtime.native.library import load_library

# Rotary tables cost 4 bytes * head_dim a position; longer contexts than this are asked for with --max-len.
DEFAULT_MAX_LEN = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export, how, and where to.

    max_len: None is the model's own length, at most DEFAULT_MAX_LEN tokens; loras: adapters to merge
    quantization: for calibrated precisions and an int8 KV cache
    kv: type of the KV cache, one of kv_cache.KV_TYPES; verify: one of references.REFERENCES
    replaces: whether another model's artifact at `out` may be deleted
    keeps_calibration: whether the artifact keeps the calibration text, as token ids
    """

    model: str
    out: Path
    precision: str = "fp32"
    max_len: int | None = None
    revision: str | None = None
    loras: tuple[Lora, ...] = ()
    force: bool = False
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    limits: Mapping[str, float] = field(default_factory=dict)
    kv: str = COMPUTE
    dialects: tuple[str, ...] = ("ort",)
    verify: str = NUMPY
    replaces: bool = False
    keeps_calibration: bool = False

    @property
    def identity(self) -> Identity:
        """Says which artifacts this export may replace."""
        return identity_of(
            self.model,
            revision=self.revision,
            precision=self.precision,
            has_int8_kv=self.kv == INT8,
            loras=self.loras,
        )

    def open(self) -> Checkpoint:
        """The checkpoint, with its adapters merged. Errors are those of `open_checkpoint`."""
        return open_checkpoint(self.model, revision=self.revision, loras=self.loras)

    def check_target(self) -> None:
        """InvalidSetting if `out` holds another model's artifact, or something that is not an artifact."""
        check_replaceable(resolved(self.out), self.identity, replaces_any=self.replaces)


def export_model(options: ExportOptions) -> Artifact:
    """Export one checkpoint; the artifact appears at `options.out` whole and verified, or not at all.

    GateFailed, with the figures, if the model is further from its reference than its precision allows; with `force` the
    artifact is written with the failed receipt. InvalidSetting if `out` holds another model's artifact. Also the errors
    of reading and writing.
    """
    check_dialects(options.dialects, options.precision)
    check_kv(options.kv, options.dialects, options.precision)
    check_reference(options.verify)
    options.check_target()
    workdir = workdir_of(resolved(options.out))
    try:
        artifact = _export(options, options.open(), workdir)
    except (GateFailed, CalibrationFailed):
        remove_workdir(workdir)  # the same command would fail again
        raise
    remove_workdir(workdir)
    return artifact


def _export(options: ExportOptions, checkpoint: Checkpoint, workdir: Path) -> Artifact:
    scheme = scheme_named(
        options.precision, stored_bits=checkpoint.stored_bits, has_input_scales=checkpoint.has_input_scales
    )
    for note in checkpoint.notes:
        sys.stderr.write(f"{note}\n")
    check_limits(options.limits, options.dialects, scheme.name, options.kv)
    _check_quantization(options, scheme)
    config = read_model(checkpoint)
    max_len = _max_len(options.max_len, config)
    config, checkpoint = config.for_length(max_len), as_described(checkpoint)
    reference = reference_named(options.verify, options.model, checkpoint, config)
    plan = ExportPlan(
        checkpoint=checkpoint,
        config=config,
        scheme=scheme,
        max_len=max_len,
        dialects=options.dialects,
        estimates=estimates_of(config),
    )
    with staged(options.out, check=options.check_target) as staging:
        given = CalibrationInput(
            checkpoint=checkpoint,
            config=config,
            max_len=plan.max_len,
            generate=sampler(staging, plan),
            workdir=workdir,
        )
        plan, accounts = _calibrated(plan, given, options)
        draft = write_unverified(staging, plan).manifest
        draft = replace(draft, origin=options.identity.origin)
        receipt = (
            verify(reference, config, Artifact(staging, draft, {}), options.limits)
            | accounts
            | {**checkpoint.provenance}
        )
        if not receipt["passed"] and not options.force:
            raise GateFailed(failure(receipt))
        receipt = finite(receipt)
        write_json(staging / RECEIPT, receipt)
        manifest = replace(draft, files={**draft.files, RECEIPT: file_entry(staging / RECEIPT)})
        write_manifest(staging, manifest)
    return Artifact(options.out, manifest, receipt)


def _calibrated(plan: ExportPlan, given: CalibrationInput, options: ExportOptions) -> tuple[ExportPlan, dict[str, Any]]:
    """The plan with calibrated weights and KV cache, where they are asked for, and what the receipt says of each."""
    accounts: dict[str, Any] = {}
    model = None
    if plan.scheme.calibration is not None:
        model = calibrated_model(given, plan.scheme, options.quantization, options.dialects)
        accounts["quantization"] = model.account
        plan = replace(
            plan,
            checkpoint=model.checkpoint,
            config=model.config,
            layers=model.layers,
            calibration=model.calibration,
        )
    if options.kv == INT8:
        kv = kv_calibration(given, options.quantization, model)
        accounts["kv_calibration"] = kv.provenance
        plan = replace(plan, calibration=kv, kv_scales=scales_of(kv, plan.checkpoint, plan.config))
    if plan.calibration is not None and not options.keeps_calibration:
        plan = replace(plan, calibration=without_text(plan.calibration))
    return plan, accounts


def check_dialects(dialects: Sequence[str], precision: str) -> None:
    """Before anything is read: InvalidSetting for an unknown dialect or one without this precision, DeviceUnavailable
    for the native one where its operators are not built, because its graph could not be verified."""
    for dialect in dialects:
        if dialect == "native":
            load_library()
        if dialect not in DIALECT_FILES:
            raise InvalidSetting(f"--dialect {dialect!r} is unknown; choose from {', '.join(DIALECT_NAMES)}")
        if precision != IMPORTED:  # that one the checkpoint decides
            check_dialect(scheme_named(precision), dialect)
        elif kind_of(dialect) != "ort":
            raise InvalidSetting(
                f"--precision {IMPORTED} is for the ort and native dialects; choose another for {dialect}"
            )


def _check_quantization(options: ExportOptions, scheme: Scheme) -> None:
    """InvalidSetting for calibration flags without effect, where the checkpoint's layers are integers already."""
    if scheme.keeps_stored and options.quantization != QuantizationOptions():
        raise InvalidSetting(
            f"{options.model} is quantized already and {options.precision} keeps its integers: calibration flags "
            "have no effect; leave out --calibration-*, --reuse-calibration and the limits of int8 layers"
        )


def _max_len(wanted: int | None, config: ModelConfig) -> int:
    trained = config.max_position_embeddings
    longest = max([trained, *(rotary.rope.longest for rotary in config.rotaries)])
    if wanted is None:
        return min(longest, DEFAULT_MAX_LEN)
    if not 2 <= wanted <= longest:
        raise InvalidSetting(
            f"--max-len {wanted} is outside 2 to {longest:,}, the longest sequence the model was made for"
        )
    return wanted
