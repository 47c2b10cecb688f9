"""Saves a calibration in the artifact, as calibration.json and calibration.npz, so that other exports can reuse it.

The .npz holds the statistics, and the text's token ids if the user asked to keep them. The .json holds the text's
origin, the ranges and the cost of each layer, for readers and plots.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.artifact.writer import write_json
from export.model.description import Site
from export.quantize.int8.ranges import SiteRanges
from export.quantize.int8.search import ranges_from_json, ranges_to_json
from export.quantize.int8.sensitivity import LayerCost
from export.quantize.statistics.activation_stats import Statistics
from export.quantize.statistics.store import load_arrays, save_arrays, statistics_from_arrays, statistics_to_arrays
from runtime.artifact.manifest import CALIBRATION, CALIBRATION_ARRAYS
from runtime.errors import CalibrationFailed

_VERSION = 2

MAX_KEPT = 128
"""Sequences kept: all of a run of the default size, 260 kB."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of a calibration run.

    statistics, ranges, costs: by site, empty if the precision needs none
    sequences: token ids of the text, empty if they were not kept; provenance: their origin
    is_rotated: statistics, ranges and costs are those of the rotated checkpoint (rotation.py)
    """

    statistics: Statistics
    ranges: dict[Site, SiteRanges]
    costs: list[LayerCost]
    sequences: Sequence[Sequence[int]]
    provenance: dict[str, Any]
    is_rotated: bool = False


def save_calibration(directory: Path, calibration: Calibration, vocab_size: int) -> None:
    """Write both files."""
    costs = {cost.site: cost for cost in calibration.costs}
    write_json(
        directory / CALIBRATION,
        {
            "version": _VERSION,
            "is_rotated": calibration.is_rotated,
            "vocab_size": vocab_size,
            "provenance": calibration.provenance,
            "layers": [
                {
                    **item,
                    "kl": costs[site].kl,
                    "macs": costs[site].macs,
                    "highest": float(calibration.statistics[site].highest.max()),
                    "typical": calibration.statistics[site].percentile(0.5),
                }
                for site, item in zip(calibration.ranges, ranges_to_json(calibration.ranges), strict=True)
            ],
        },
    )
    arrays = statistics_to_arrays(calibration.statistics)
    for idx, sequence in enumerate(calibration.sequences[:MAX_KEPT]):
        arrays[f"sequence/{idx}"] = np.asarray(sequence, np.int32)
    save_arrays(directory / CALIBRATION_ARRAYS, arrays)


def load_calibration(path: Path, vocab_size: int) -> Calibration:
    """Read the calibration of an artifact or of a calibration.json; CalibrationFailed says what is wrong."""
    file = path / CALIBRATION if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationFailed(f"{file} cannot be read as a calibration: {error}") from error
    if not isinstance(raw, dict) or raw.get("version") != _VERSION:
        raise CalibrationFailed(f"{file} is not a calibration of this release (version {_VERSION}); calibrate again")
    arrays_file = file.with_name(CALIBRATION_ARRAYS)
    arrays = load_arrays(arrays_file)
    statistics = statistics_from_arrays(arrays, arrays_file)
    try:
        ranges = ranges_from_json(raw["layers"])
        costs = [LayerCost(Site(item["layer"], item["kind"]), item["kl"], item["macs"]) for item in raw["layers"]]
        count = sum(name.startswith("sequence/") for name in arrays)
        sequences = [arrays[f"sequence/{idx}"].tolist() for idx in range(count)]
        provenance = _without_path(dict(raw["provenance"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationFailed(f"{file} is damaged: {error!r}; calibrate again") from error
    highest = max((max(ids, default=0) for ids in sequences), default=0)
    # Earlier releases did not write vocab_size.
    if highest >= vocab_size or raw.get("vocab_size", vocab_size) != vocab_size:
        raise CalibrationFailed(f"{file} was made for another vocabulary than this model's {vocab_size:,} tokens")
    return Calibration(statistics, ranges, costs, sequences, provenance, raw.get("is_rotated") is True)


def _without_path(provenance: dict[str, Any]) -> dict[str, Any]:
    """Reduce the path of the text's file, which earlier releases wrote, to its name."""
    source = provenance.get("source")
    if isinstance(source, str) and source.startswith(("/", "~")):
        return {**provenance, "source": Path(source).name}
    return provenance
