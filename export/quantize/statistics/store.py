"""Saves statistics in an .npz file of a few kilobytes per layer, its arrays named `FIELD/layer/kind`.

Reading checks that every array is there and finite.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.model.description import Site
from export.quantize.statistics.activation_stats import NUM_FOLDS, SiteStatistics, Statistics
from export.storage.whole_file import whole_file
from runtime.errors import CalibrationFailed

_FIELDS = ("absmax", "square_sum", "num_tokens", "histogram")


def statistics_to_arrays(statistics: Statistics) -> dict[str, NDArray[Any]]:
    """The arrays of all sites."""
    return {
        f"{name}/{site.layer}/{site.kind}": np.asarray(getattr(entry, name))
        for site, entry in statistics.items()
        for name in _FIELDS
    }


def save_arrays(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an .npz file atomically."""
    with whole_file(file) as handle:
        np.savez(handle, allow_pickle=False, **arrays)


def statistics_from_arrays(arrays: Mapping[str, NDArray[Any]], file: Path) -> Statistics:
    """The statistics of all sites; CalibrationFailed, with the file's name, if an array is missing or damaged."""
    sites = {tuple(name.split("/")[1:]) for name in arrays if name.startswith("absmax/")}
    statistics: Statistics = {}
    try:
        for layer, kind in sorted(sites, key=lambda site: (int(site[0]), site[1])):
            absmax, square_sum, num_tokens, histogram = (arrays[f"{name}/{layer}/{kind}"] for name in _FIELDS)
            if absmax.shape != (NUM_FOLDS, len(square_sum)) or not np.isfinite(absmax).all():
                raise CalibrationFailed(f"{file}: the maxima of layer {layer} {kind} are damaged; calibrate again")
            entry = SiteStatistics(absmax, square_sum, int(num_tokens), histogram)
            statistics[Site(int(layer), kind)] = entry
    except (KeyError, ValueError, TypeError) as error:
        raise CalibrationFailed(f"{file} is not a calibration file: {error}; calibrate again") from error
    return statistics


def load_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of an .npz file; CalibrationFailed if it cannot be read."""
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise CalibrationFailed(f"{file} cannot be read as a calibration file: {error}; calibrate again") from error
