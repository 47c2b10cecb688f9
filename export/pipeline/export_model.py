"""Checkpoint to artifact: read, build, check, verify, gate, publish. The one path every export takes."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree

from export.artifact.identity import Identity, check_replaceable, identity_of
from export.artifact.writer import file_entry, resolved, staged, write_json, write_manifest, write_texts
from export.calibration.dataset import Generate
from export.calibration.self_samples import artifact_generator
from export.checkpoint.protocol import Checkpoint
from export.checks.model_reading import read_model
from export.model.architectures import as_described
from export.model.description import ModelConfig
from export.model.precision import EXPORTABLE, Precision, precision_named
from export.model.trt_precision import trt_precision_named
from export.pipeline.calibrated import (
    CalibratedModel,
    QuantizationOptions,
    calibration_material,
    prepare,
    remove_workdir,
    workdir_of,
)
from export.pipeline.graph_files import write_graphs
from export.pipeline.kept_text import with_text, without_text
from export.quantize.int8.saved import Calibration, save_calibration
from export.quantize.kv_cache import (
    COMPUTE,
    INT8,
    NUM_SEQUENCES,
    check_kv,
    for_kv_alone,
    has_kv_statistics,
    load_kv_calibration,
    scales_of,
    unrotated,
    with_kv_statistics,
)
from export.quantize.layers import Layers, layers_of_checkpoint
from export.quantize.statistics.kv_scales import PER_CHANNEL
from export.sources.open import open_checkpoint
from export.verify.gates import check_limits, failure
from export.verify.receipt import verify
from export.verify.references import NUMPY, check_reference, reference_named
from runtime.artifact.json_shape import finite
from runtime.artifact.manifest import (
    DIALECT_FILES,
    RECEIPT,
    SCHEMA_VERSION,
    Artifact,
    KvContract,
    Manifest,
    ModelDims,
)
from runtime.errors import CalibrationFailed, GateFailed, InvalidSetting

# Rotary tables cost 4 bytes * head_dim a position; longer contexts than this are asked for with --max-len.
DEFAULT_MAX_LEN = 32_768

_VERSIONED = ("headrace", "onnx", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export and where to.

    max_len: None is the model's own length, at most DEFAULT_MAX_LEN tokens
    quantization: read by calibrated precisions and for an int8 cache only
    kv: type of the KV cache, one of kv_calibration.KV_TYPES
    verify: one of references.REFERENCES
    replaces: whether another model's artifact at `out` may be deleted
    keeps_calibration: whether the artifact holds the calibration text, as token ids
    """

    model: str
    out: Path
    precision: str = "fp32"
    max_len: int | None = None
    revision: str | None = None
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
        """Which artifacts this export may replace."""
        return identity_of(self.model, revision=self.revision, precision=self.precision, has_int8_kv=self.kv == INT8)

    def check_target(self) -> None:
        """InvalidSetting if what is at `out` is another model's artifact, or none."""
        check_replaceable(resolved(self.out), self.identity, replaces_any=self.replaces)


def export_model(options: ExportOptions) -> Artifact:
    """Export one checkpoint; the artifact appears at `options.out` whole and verified, or not at all.

    GateFailed, with the figures, if the model is further from its reference than its precision allows, unless
    `force`: then the artifact carries the failed receipt. InvalidSetting if `out` holds another model's artifact. Other
    errors are those of reading and writing.
    """
    check_dialects(options.dialects, options.precision)
    check_kv(options.kv, options.dialects, options.precision)
    check_reference(options.verify)
    options.check_target()
    workdir = workdir_of(resolved(options.out))
    try:
        artifact = _export(options, open_checkpoint(options.model, revision=options.revision), workdir)
    except (GateFailed, CalibrationFailed):
        remove_workdir(workdir)  # nothing to go on with: the same command would fail again
        raise
    remove_workdir(workdir)
    return artifact


def _export(options: ExportOptions, checkpoint: Checkpoint, workdir: Path) -> Artifact:
    row = _row(options, checkpoint.stored_bits)
    precision = row if "ort" in options.dialects else None
    check_limits(options.limits, options.dialects, precision.name if precision else options.precision, options.kv)
    _check_quantization(options, row)
    config = read_model(checkpoint)
    max_len = _max_len(options.max_len, config)
    config, checkpoint = config.for_length(max_len), as_described(checkpoint)
    reference = reference_named(options.verify, options.model, checkpoint, config)
    with staged(options.out, check=options.check_target) as staging:
        model = None
        if row is not None and row.calibrated is not None:
            model = _calibrated_model(staging, checkpoint, config, row, options, max_len, workdir)
        kv = None
        if options.kv == INT8:
            kv = _kv_calibration(staging, checkpoint, config, options, max_len, model, workdir)
        if not options.keeps_calibration:
            model = model and replace(model, calibration=without_text(model.calibration))
            kv = kv and without_text(kv)
        draft = write_unverified(
            staging,
            checkpoint,
            config,
            precision,
            max_len,
            model,
            kv,
            dialects=options.dialects,
            name=options.precision,
        ).manifest
        draft = replace(draft, origin=options.identity.origin, commit=checkpoint.commit)
        receipt = verify(reference, config, Artifact(staging, draft, {}), options.limits)
        if model is not None:
            receipt["quantization"] = model.account
        if kv is not None:
            receipt["kv_calibration"] = kv.provenance
        if not receipt["passed"] and not options.force:
            raise GateFailed(failure(receipt))
        receipt = finite(receipt)
        write_json(staging / RECEIPT, receipt)
        manifest = replace(draft, files={**draft.files, RECEIPT: file_entry(staging / RECEIPT)})
        write_manifest(staging, manifest)
    return Artifact(options.out, manifest, receipt)


def write_unverified(
    directory: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision | None,
    max_len: int,
    model: CalibratedModel | None = None,
    kv: Calibration | None = None,
    *,
    dialects: Sequence[str] = ("ort",),
    name: str = "",
) -> Artifact:
    """Graphs, weights and texts in an empty directory, and the manifest of a session that runs them; no receipt.

    precision: of the `ort` dialect, None without it; then `name` is that of the other dialects' precision
    model: for calibrated precisions, what is written instead of the checkpoint's own weights
    kv: statistics of K and V for an int8 cache
    """
    if model is not None:
        checkpoint, config = model.checkpoint, model.config
    calibration = kv if kv is not None or model is None else model.calibration
    if calibration is not None:
        save_calibration(directory, calibration, config.vocab_size)
    scales = scales_of(kv, checkpoint, config) if kv is not None else None
    name = precision.name if precision is not None else name
    write_texts(directory, checkpoint.text_files())
    layers = model.layers if model else _stored_layers(checkpoint, config, precision)
    step_weight_bytes = write_graphs(directory, checkpoint, config, precision, max_len, dialects, name, layers, scales)
    manifest = _manifest(directory, checkpoint, config, precision, max_len, dialects, name, step_weight_bytes)
    if scales is not None:
        manifest = replace(manifest, kv=KvContract(dtype="int8", scales=PER_CHANNEL))
    return Artifact(directory, manifest, {})


def _stored_layers(checkpoint: Checkpoint, config: ModelConfig, precision: Precision | None) -> Mapping[str, Layers]:
    """The integers of a checkpoint that is quantized already. The `ort` graph takes them if its precision says so."""
    if checkpoint.stored_bits is None:
        return {}
    stored = layers_of_checkpoint(checkpoint, config)
    return {"ort": stored if precision is not None and precision.keeps_imported else {}, "trt": stored}


def _row(options: ExportOptions, stored_bits: int | None) -> Precision | None:
    """The precision's row in the `ort` table, which says what is calibrated; None for one of TensorRT's alone."""
    if "ort" not in options.dialects and options.precision not in EXPORTABLE:
        return None
    return precision_named(options.precision, stored_bits=stored_bits)


def _calibrated_model(
    staging: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision,
    options: ExportOptions,
    max_len: int,
    workdir: Path,
) -> CalibratedModel:
    generate = _generator(staging, checkpoint, config, max_len)
    quantization, dialects = options.quantization, options.dialects
    return prepare(
        checkpoint, config, precision, quantization, workdir, max_len=max_len, generate=generate, dialects=dialects
    )


def _generator(staging: Path, checkpoint: Checkpoint, config: ModelConfig, max_len: int) -> Generate:
    """What `--calib self` samples with."""

    def generate(starts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        """Sample from an artifact with 8-bit weights: within half a per cent of the model, in half the time."""
        sampler = staging / "sampler"
        sampler.mkdir()
        artifact = write_unverified(sampler, checkpoint, config, precision_named("w8a16"), max_len)
        try:
            return artifact_generator(artifact, length=length)(starts, length, seed)
        finally:
            rmtree(sampler)

    return generate


def _kv_calibration(
    staging: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: ExportOptions,
    max_len: int,
    model: CalibratedModel | None,
    workdir: Path,
) -> Calibration:
    """Statistics of K and V: the precision's own calibration, an earlier one, or a run for them alone."""
    quantization = options.quantization
    generate = _generator(staging, checkpoint, config, max_len)
    if model is not None and model.calibration.ranges:
        return model.calibration
    if model is not None:
        return with_kv_statistics(checkpoint, config, unrotated(model.calibration), workdir, limit=NUM_SEQUENCES)
    if quantization.calibration is not None:
        found = unrotated(load_kv_calibration(quantization.calibration, config))
        if not has_kv_statistics(found, config):
            found = with_text(
                found,
                quantization.calibration,
                quantization.calib,
                lambda text: calibration_material(checkpoint, config, text, max_len, generate),
            )
    else:
        material = calibration_material(checkpoint, config, quantization.calib, max_len, generate)
        found = Calibration({}, {}, [], material.sequences, material.provenance)
    return for_kv_alone(with_kv_statistics(checkpoint, config, found, workdir))


def check_dialects(dialects: Sequence[str], precision: str) -> None:
    """InvalidSetting, before anything is read, for a dialect that is not there or has no such precision."""
    for dialect in dialects:
        if dialect not in DIALECT_FILES:
            raise InvalidSetting(f"dialect {dialect!r} is unknown; choose from {', '.join(DIALECT_FILES)}")
        if dialect != "ort":
            trt_precision_named(precision)
        elif precision != "imported":  # which the checkpoint decides
            precision_named(precision)


def _check_quantization(options: ExportOptions, precision: Precision | None) -> None:
    """InvalidSetting for calibration that would change nothing: the checkpoint's layers are integers already."""
    if precision is not None and precision.keeps_imported and options.quantization != QuantizationOptions():
        raise InvalidSetting(
            f"{options.model} is quantized already and {options.precision} keeps its integers: --calib, --calibration "
            "and their kin have no effect; leave them out"
        )


def _max_len(wanted: int | None, config: ModelConfig) -> int:
    trained = config.max_position_embeddings
    rope = config.rope
    stretched = trained if rope is None or rope.kind == "default" else int(rope.original_max_len * rope.factor)
    longest = trained if config.embedding.positions else max(trained, stretched)
    if wanted is None:
        return min(longest, DEFAULT_MAX_LEN)
    if not 2 <= wanted <= longest:
        raise InvalidSetting(
            f"--max-len {wanted} is outside 2 to {longest:,}, the longest sequence the model was made for"
        )
    return wanted


def _manifest(
    staging: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision | None,
    max_len: int,
    dialects: Sequence[str],
    name: str,
    step_weight_bytes: int,
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=_name_of(checkpoint),
        source=checkpoint.source,
        precision=name,
        dims=ModelDims(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_len=max_len,
        ),
        kv=KvContract(dtype=(precision or trt_precision_named(name)).numpy_dtype.name),
        trt_kv=KvContract(dtype=trt_precision_named(name).numpy_dtype.name) if set(dialects) - {"ort"} else None,
        dialects={dialect: DIALECT_FILES[dialect] for dialect in dialects},
        is_tied=config.tie_word_embeddings,
        eos_ids=config.eos_ids,
        bos_id=config.bos_id,
        files={file.name: file_entry(file) for file in sorted(staging.iterdir())},
        versions={package: importlib.metadata.version(package) for package in _VERSIONED},
        step_weight_bytes=step_weight_bytes,
    )


def _name_of(checkpoint: Checkpoint) -> str:
    """What clients call the model: of a hub id the last part, without the revision, which may have a slash itself."""
    source = checkpoint.source
    return source.partition("@")[0].rpartition("/")[2] if "/" in source.partition("@")[0] else source
