"""The calibrated part of an export: find or make a calibration, and what the decoder graph is then built from."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

import numpy as np

from export.calibration_file import Calibration, load_calibration
from export.calibration_set import SELF, CalibrationOptions, CalibrationSet, Generate, load_calibration_set
from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.int8_model import Int8Model, Int8Options, calibrate, int8_model
from runtime.errors import InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """How a calibrated precision is made.

    calib: the text; int8: what may be left out; calibration: an artifact or calibration.json to use instead of a run
    """

    calib: CalibrationOptions = field(default_factory=CalibrationOptions)
    int8: Int8Options = field(default_factory=Int8Options)
    calibration: Path | None = None


def workdir_of(out: Path) -> Path:
    """Where the calibration of an export to `out` keeps what is finished, so that an interrupted one can go on."""
    return out.parent / f".{out.name}.calibration"


def remove_workdir(workdir: Path) -> None:
    """After an export that needs it no longer."""
    with suppress(OSError):
        rmtree(workdir)


def prepare_int8(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: QuantizationOptions,
    workdir: Path,
    *,
    max_len: int,
    generate: Generate,
) -> Int8Model:
    """Calibrate, or read a calibration, then choose and round. `generate` samples from the model for `--calib self`."""
    if options.calibration is not None:
        found = load_calibration(options.calibration, config.vocab_size)
        _check_fits(found, config, options.calibration)
    else:
        found = calibrate(
            checkpoint, config, calibration_material(checkpoint, config, options.calib, max_len, generate), workdir
        )
    return int8_model(checkpoint, config, found, options.int8, workdir)


def _check_fits(calibration: Calibration, config: ModelConfig, path: Path) -> None:
    sizes = {"qkv": config.hidden_size, "down": config.intermediate_size, "o": config.num_heads * config.head_dim}
    layers = {site.layer for site in calibration.ranges}
    wrong = layers != set(range(config.num_layers + 1)) or any(
        entry.absmax.shape[1] != sizes.get(site.kind, entry.absmax.shape[1])
        for site, entry in calibration.statistics.items()
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
        length=min(options.length, max_len),
        max_len=max_len,
        generate=generate if options.source == SELF else None,
    )


def _random_material(config: ModelConfig, options: CalibrationOptions, max_len: int) -> CalibrationSet:
    """A checkpoint without a tokenizer (tests, experiments) is calibrated, as it is verified, on random ids."""
    length = min(options.length, max_len)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, (options.num_samples, length)).tolist()
    return CalibrationSet(ids, {"source": "random ids: the checkpoint has no tokenizer", "num_sequences": len(ids)})
