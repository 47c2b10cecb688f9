"""The calibrated part of an export: find or make a calibration, and what the decoder graph is then built from.

Which calibrated scheme a precision is, its row in precision.py says; both use the same text and the same files.
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
from export.model.precision import Calibrated, Precision
from export.model.trt_precision import trt_precision_named
from export.pipeline.kept_text import RANDOM, ReadText, with_text
from export.pipeline.memory_plan import check_memory
from export.quantize.int4.model import Stores, account_of, block_calibration, int4_model, plan_of
from export.quantize.int4.rounding import Plan
from export.quantize.int8.model import Int8Options, calibrate, int8_model, summary
from export.quantize.int8.rotation import RotatedCheckpoint, rotated_config
from export.quantize.int8.saved import Calibration, load_calibration
from export.quantize.layers import Layers
from runtime.errors import InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """How a calibrated precision is made.

    calib: the text; int8: what may be left out; calibration: an artifact or calibration.json to use instead of a run
    ignore_memory: start although the memory that it will take is not free
    """

    calib: CalibrationOptions = field(default_factory=CalibrationOptions)
    int8: Int8Options = field(default_factory=Int8Options)
    calibration: Path | None = None
    ignore_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedModel:
    """What the graphs of a calibrated precision are built from.

    layers: those whose weights are integers, for the `ort` graph and for the standard ones ("trt")
    account: the receipt's, JSON-able
    """

    checkpoint: Checkpoint
    config: ModelConfig
    layers: Mapping[str, Layers]
    calibration: Calibration
    account: Mapping[str, Any]


def workdir_of(out: Path) -> Path:
    """Where the calibration of an export to `out` keeps what is finished, so that an interrupted one can go on."""
    return out.parent / f".{out.name}.calibration"


def remove_workdir(workdir: Path) -> None:
    """After an export that needs it no longer."""
    with suppress(OSError):
        rmtree(workdir)


def prepare(
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision,
    options: QuantizationOptions,
    workdir: Path,
    *,
    max_len: int,
    generate: Generate,
    dialects: Sequence[str] = ("ort",),
) -> CalibratedModel:
    """Calibrate, or read a calibration, then choose and round. `generate` samples from the model for `--calib self`."""
    assert precision.calibrated is not None
    stores: dict[str, Stores] = {"ort": precision} if "ort" in dialects else {}
    if set(dialects) - {"ort"}:
        stores["trt"] = trt_precision_named(precision.name)
    # This may refuse the model: better before the text than after.
    plans = {dialect: plan_of(config, row) for dialect, row in stores.items()}
    check_memory(
        config,
        precision.calibrated,
        num_samples=options.calib.num_samples,
        length=options.calib.length_within(max_len),
        is_ignored=options.ignore_memory,
        dialects=dialects,
    )

    def read(text: CalibrationOptions) -> CalibrationSet:
        return calibration_material(checkpoint, config, text, max_len, generate)

    if options.calibration is not None:
        found = _earlier(options.calibration, options.calib, config, read)
        material = CalibrationSet([list(ids) for ids in found.sequences], found.provenance)
    else:
        found, material = None, read(options.calib)
    if precision.calibrated is Calibrated.BLOCKS:
        return _in_blocks(checkpoint, config, plans, found or block_calibration(material), workdir)
    rotated, config = RotatedCheckpoint(checkpoint, config), rotated_config(config)
    if found is None or not found.ranges:  # that of a precision that needs none
        found = calibrate(rotated, config, material, workdir)
    model = int8_model(rotated, config, found, options.int8, workdir)
    return CalibratedModel(
        checkpoint=model.checkpoint,
        config=model.config,
        layers={"ort": model.layers, "trt": model.layers},
        calibration=found,
        account=summary(model),
    )


def _in_blocks(
    checkpoint: Checkpoint,
    config: ModelConfig,
    plans: Mapping[str, Plan],
    found: Calibration,
    workdir: Path,
) -> CalibratedModel:
    """Each dialect rounded apart: blocks and zero points differ, and so do the errors each layer finds in its input."""
    rounded = {
        dialect: int4_model(checkpoint, config, plan, found.sequences, workdir / dialect)
        for dialect, plan in plans.items()
    }
    return CalibratedModel(
        checkpoint=checkpoint,
        config=config,
        layers={dialect: model.layers for dialect, model in rounded.items()},
        calibration=found,
        account=account_of(rounded, found.provenance),
    )


def _earlier(path: Path, given: CalibrationOptions, config: ModelConfig, read: ReadText) -> Calibration:
    """The calibration at --calibration, with its text."""
    found = load_calibration(path, config.vocab_size)
    _check_fits(found, config, path)
    return with_text(found, path, given, read)


def _check_fits(calibration: Calibration, config: ModelConfig, path: Path) -> None:
    layers = {site.layer for site in calibration.ranges}
    known, caches = config.by_site, ("k", "v")
    wrong = (layers and layers != set(range(config.num_layers + 1))) or any(
        site not in known or entry.absmax.shape[1] != known[site].num_inputs
        for site, entry in calibration.statistics.items()
        if site.kind not in caches
    )
    if wrong:
        raise InvalidSetting(f"--calibration {path} belongs to a model of another shape; calibrate this one")


def calibration_material(
    checkpoint: Checkpoint, config: ModelConfig, options: CalibrationOptions, max_len: int, generate: Generate
) -> CalibrationSet:
    """The text that `options` names, or random ids where there is no tokenizer to read text with."""
    texts = checkpoint.text_files()
    if "tokenizer.json" not in texts:
        return _random_material(config, options, max_len)
    return load_calibration_set(
        options.source,
        texts,
        num_samples=options.num_samples,
        length=options.length_within(max_len),
        max_len=max_len,
        generate=generate if options.source == SELF else None,
    )


def _random_material(config: ModelConfig, options: CalibrationOptions, max_len: int) -> CalibrationSet:
    """A checkpoint without a tokenizer (tests, experiments) is calibrated, as it is verified, on random ids."""
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
