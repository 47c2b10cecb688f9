"""Calibrated int8: from a checkpoint and a calibration set to a smoothed checkpoint, rounded weights and scales.

    statistics, ranges, cost of each layer -> layers in two passes -> rounded weights
    (calibrate)                               (choose_two_pass)       (round_weights)

The first makes a `Calibration`. It is saved in the artifact, so that another export can reuse it. Each of the two
passes over the model reads a layer once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.calibration.dataset import CalibrationSet
from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig, Site
from export.quantize.int8.ranges import InputRange
from export.quantize.int8.rotation import stream_obstacle
from export.quantize.int8.saved import Calibration
from export.quantize.int8.search import RangeSearch, RoundedWeights, round_weights
from export.quantize.int8.sensitivity import DEFAULT_MAX_INCREASE, CostMeasurement, choose_two_pass
from export.quantize.int8.smoothquant import SmoothedCheckpoint, producer_of, smoothed_config
from export.quantize.rounding.layers import Int8Layer, Layers, num_experts_of, undecided
from export.quantize.statistics.collect import collect_statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Options:
    """max_ppl_increase: as a share, 0.005 is 0.5 %; keep: layers that get two int8 passes whatever they cost."""

    max_ppl_increase: float = DEFAULT_MAX_INCREASE
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Int8Model:
    """Everything that a decoder graph is built from."""

    checkpoint: SmoothedCheckpoint
    config: ModelConfig
    layers: Layers
    ranges: Mapping[Site, InputRange]
    calibration: Calibration


def calibrate(checkpoint: Checkpoint, config: ModelConfig, text: CalibrationSet, workdir: Path) -> Calibration:
    """Collect statistics, search the ranges and measure the cost of each layer. `checkpoint` is already rotated.

    CalibrationFailed if an activation is not finite.
    """
    search = RangeSearch(config)
    measured = CostMeasurement(checkpoint, config, text.sequences, search.ranges, workdir)
    statistics = collect_statistics(checkpoint, config, text.sequences, workdir, [search, measured])
    return Calibration(statistics, search.ranges, measured.costs, text.sequences, text.provenance, is_rotated=True)


def int8_model(
    checkpoint: Checkpoint, config: ModelConfig, calibration: Calibration, options: Int8Options, workdir: Path
) -> Int8Model:
    """Choose the layers in two passes, and round all weights. `workdir` is read until the graphs are written."""
    two_pass = choose_two_pass(calibration.costs, max_increase=options.max_ppl_increase, keep=options.keep)
    ranges = {
        site: found.two_pass if site in two_pass else found.one_pass for site, found in calibration.ranges.items()
    }
    rounded = RoundedWeights(workdir / "rounded")
    vectors = round_weights(checkpoint, config, calibration.statistics, calibration.sequences, ranges, rounded)
    smoothed, own_config = SmoothedCheckpoint(checkpoint, config, vectors), smoothed_config(config, vectors)
    layers = undecided(own_config) | {
        site: Int8Layer(chosen.scale, chosen.fine_scale, partial(rounded.get, site)) for site, chosen in ranges.items()
    }
    return Int8Model(smoothed, own_config, layers, ranges, calibration)


def int8_report(model: Int8Model) -> dict[str, Any]:
    """The receipt's quantization report; JSON-able."""
    costs, head = model.calibration.costs, model.config.head.linear.site
    two_pass = [cost for cost in costs if model.ranges[cost.site].fine_scale is not None]
    counted = [cost for cost in costs if cost.site != head]
    return {
        "two_pass": [str(cost.site) for cost in two_pass],
        "two_pass_share": sum(cost.macs for cost in counted if cost in two_pass) / sum(cost.macs for cost in counted),
        "predicted_perplexity_increase": math.expm1(sum(cost.kl for cost in costs if cost not in two_pass)),
        "layer_errors": {str(site): chosen.error for site, chosen in model.ranges.items()},
        **_left_out(model),
        "share_counts": "multiply-adds a token of all linear layers but the LM head",
        "calibration": model.calibration.provenance,
    }


def _left_out(model: Int8Model) -> dict[str, Any]:
    """Rotations, smoothing vectors and int8 layers that this decoder cannot have; keys only where there are some."""
    config = model.config
    found: dict[str, Any] = {}
    if (obstacle := stream_obstacle(config)) is not None:
        found["stream_not_rotated"] = obstacle
    if plain := [str(site) for site in model.ranges if producer_of(config, site) is None]:
        found["not_smoothed"] = plain
    if missing := [site for site, layer in model.layers.items() if layer is None]:
        found["weight_only"] = list(map(str, missing))
    if count := num_experts_of(missing):
        found["experts_not_reached"] = count
    return found
