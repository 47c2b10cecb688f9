"""The calibrated part of an export: makes or reuses a calibration, then rounds the weights with it.

The precision's row in precision.py says which scheme it uses. Both schemes use the same text and the same files.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from export.calibration.dataset import (
    BUILT_IN,
    SELF,
    CalibrationOptions,
    CalibrationSet,
    Generate,
    check_sizes,
    load_calibration_set,
    sequences_digest,
)
from export.calibration.records import FLAG
from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig
from export.pipeline.kept_text import RANDOM, with_text
from export.pipeline.memory_plan import check_memory
from export.quantize.int4.model import block_calibration, int4_model, int4_report, plan_of
from export.quantize.int4.rounding import Plan
from export.quantize.int8.model import Int8Options, calibrate, int8_model, int8_report
from export.quantize.int8.rotation import RotatedCheckpoint, rotated_config
from export.quantize.int8.saved import Calibration, load_calibration
from export.quantize.kv_cache import (
    NUM_SEQUENCES,
    for_kv_alone,
    has_kv_statistics,
    load_kv_calibration,
    unrotated,
    with_kv_statistics,
)
from export.quantize.rounding.layers import Layers
from export.schemes.scheme import CalibrationNeed as Need
from export.schemes.scheme import Scheme, Storage
from runtime.artifact.manifest import kind_of
from runtime.errors import InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """How a calibrated precision is made.

    text: what to calibrate on; reuse: an artifact or calibration.json whose calibration replaces a run
    int8: which layers take two int8 passes
    ignore_memory: start although the memory that calibration is predicted to take is not free
    """

    text: CalibrationOptions = field(default_factory=CalibrationOptions)
    int8: Int8Options = field(default_factory=Int8Options)
    reuse: Path | None = None
    ignore_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedModel:
    """The weights and layers that the graphs of a calibrated precision are built from.

    layers: those whose weights are integers, for the `ort` graph and for the standard ones ("trt")
    account: quantization report for the receipt, JSON-able
    has_kv: whether the calibration's statistics of K and V are those of `checkpoint`
    """

    checkpoint: Checkpoint
    config: ModelConfig
    layers: Mapping[str, Layers]
    calibration: Calibration
    account: Mapping[str, Any]
    has_kv: bool


def workdir_of(out: Path) -> Path:
    """The directory where calibration keeps finished work, so that an interrupted export can go on."""
    return out.parent / f".{out.name}.calibration"


def remove_workdir(workdir: Path) -> None:
    """Remove the directory after an export."""
    with suppress(OSError):
        rmtree(workdir)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationInput:
    """The model to calibrate, and what is needed to read text for it.

    max_len: the artifact's longest sequence, in tokens; workdir: keeps what is finished, for an interrupted run
    generate: samples text from the model
    """

    checkpoint: Checkpoint
    config: ModelConfig
    max_len: int
    generate: Generate
    workdir: Path

    def read(self, options: CalibrationOptions) -> CalibrationSet:
        """The text that `options` names, or random ids where there is no tokenizer to read text with."""
        texts = self.checkpoint.text_files()
        if "tokenizer.json" not in texts:
            return _random_ids(self.config, options, self.max_len)
        return load_calibration_set(
            options.source,
            texts,
            num_samples=options.num_samples,
            length=options.length_within(self.max_len),
            max_len=self.max_len,
            generate=self.generate if options.source == SELF else None,
        )


def calibrated_model(
    given: CalibrationInput, scheme: Scheme, options: QuantizationOptions, dialects: Sequence[str] = ("ort",)
) -> CalibratedModel:
    """Calibrate, or read a calibration, then choose and round. `scheme` is one that needs calibration."""
    assert scheme.calibration is not None
    checkpoint, config, workdir = given.checkpoint, given.config, given.workdir
    kinds = {kind_of(dialect): scheme.storage_of(dialect) for dialect in dialects}
    stores: dict[str, Storage] = {kind: storage for kind, storage in kinds.items() if storage is not None}
    # Before the text is read, because this may refuse the model.
    plans = {dialect: plan_of(config, row) for dialect, row in stores.items()}
    check_memory(
        config,
        scheme,
        num_samples=options.text.num_samples,
        length=options.text.length_within(given.max_len),
        is_ignored=options.ignore_memory,
        dialects=dialects,
    )
    if options.reuse is not None:
        found = _earlier(options.reuse, options.text, given)
        material = CalibrationSet([list(ids) for ids in found.sequences], found.provenance)
    else:
        found, material = None, given.read(options.text)
    if scheme.calibration is Need.BLOCKS:
        return _in_blocks(given, plans, found or block_calibration(material))
    rotated, config = RotatedCheckpoint(checkpoint, config), rotated_config(config)
    if found is None or not found.ranges:  # a reused calibration of w4a16 has none
        found = calibrate(rotated, config, material, workdir)
    model = int8_model(rotated, config, found, options.int8, workdir)
    return CalibratedModel(
        checkpoint=model.checkpoint,
        config=model.config,
        layers={"ort": model.layers, "trt": model.layers},
        calibration=found,
        account=int8_report(model),
        has_kv=True,
    )


def kv_calibration(given: CalibrationInput, options: QuantizationOptions, model: CalibratedModel | None) -> Calibration:
    """Statistics of K and V: from the calibration of `model`, from an earlier one, or from a run for them alone."""
    if model is not None and model.has_kv:
        return model.calibration
    if model is not None:
        found = unrotated(model.calibration)
        return with_kv_statistics(given.checkpoint, given.config, found, given.workdir, limit=NUM_SEQUENCES)
    if options.reuse is not None:
        found = unrotated(load_kv_calibration(options.reuse, given.config))
        if not has_kv_statistics(found, given.config):
            found = with_text(found, options.reuse, options.text, given.read)
    else:
        material = given.read(options.text)
        found = Calibration({}, {}, [], material.sequences, material.provenance)
    return for_kv_alone(with_kv_statistics(given.checkpoint, given.config, found, given.workdir))


def _in_blocks(given: CalibrationInput, plans: Mapping[str, Plan], found: Calibration) -> CalibratedModel:
    """Round for each dialect separately: blocks and zero points differ, and so do the errors in each layer's input."""
    rounded = {
        dialect: int4_model(given.checkpoint, given.config, plan, found.sequences, given.workdir / dialect)
        for dialect, plan in plans.items()
    }
    return CalibratedModel(
        checkpoint=given.checkpoint,
        config=given.config,
        layers={dialect: model.layers for dialect, model in rounded.items()},
        calibration=found,
        account=int4_report(rounded, found.provenance),
        has_kv=False,
    )


def _earlier(path: Path, text: CalibrationOptions, given: CalibrationInput) -> Calibration:
    """The calibration to reuse, with its text."""
    found = load_calibration(path, given.config.vocab_size)
    _check_fits(found, given.config, path)
    return with_text(found, path, text, given.read)


def _check_fits(calibration: Calibration, config: ModelConfig, path: Path) -> None:
    layers = {site.layer for site in calibration.ranges}
    known, caches = config.by_site, ("k", "v")
    wrong = (layers and layers != set(range(config.num_layers + 1))) or any(
        site not in known or entry.absmax.shape[1] != known[site].num_inputs
        for site, entry in calibration.statistics.items()
        if site.kind not in caches
    )
    if wrong:
        raise InvalidSetting(f"--reuse-calibration {path} belongs to a model of another shape; calibrate this one")


def _random_ids(config: ModelConfig, options: CalibrationOptions, max_len: int) -> CalibrationSet:
    """Random ids, on which a checkpoint without a tokenizer (tests, experiments) is calibrated and verified."""
    length = options.length_within(max_len)
    check_sizes(options.num_samples, length, max_len)
    if options.source != BUILT_IN:
        raise InvalidSetting(
            f"{FLAG} {options.source} cannot be read: the checkpoint has no tokenizer.json; put the model's own beside "
            "its weights"
        )
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, (options.num_samples, length)).tolist()
    provenance = {
        "source": f"{RANDOM}: the checkpoint has no tokenizer",
        "num_sequences": len(ids),
        "num_samples": options.num_samples,
        "length": length,
        "sequences_sha256": sequences_digest(ids),
    }
    return CalibrationSet(ids, provenance)
