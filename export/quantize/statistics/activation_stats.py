"""Statistics of activations: per-channel maxima, sums of squares and a histogram, updated sequence by sequence.

Their size does not grow with the number of samples. A NaN or an infinity raises an error at once, because a range that
contains one would make every other number 0. Knows nothing about graphs or integers.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.model.description import Site
from runtime.errors import CalibrationFailed

NUM_FOLDS = 4
"""Sequence i belongs to fold i % NUM_FOLDS. Each fold has its own maxima, so that a search can judge a range on text
that the range does not come from."""

# Magnitudes from 2^-20 to 2^20 in steps of 2^(1/4), 19 %: fine enough to see how far an outlier stands out.
_LOWEST, _BINS_PER_OCTAVE, _NUM_BINS = -20, 4, 160
# One token in 16 goes into the histogram: the logarithms of all would take longer than the matrix products.
_HISTOGRAM_STRIDE = 16


@dataclass(slots=True)
class SiteStatistics:
    """Statistics of one input with K channels.

    absmax: float32 `[NUM_FOLDS, K]`, largest magnitude of each channel; square_sum: float64 `[K]`
    histogram: int64 `[bins]` of magnitudes, see `percentile`
    """

    absmax: NDArray[np.float32]
    square_sum: NDArray[np.float64]
    num_tokens: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_NUM_BINS, np.int64))

    @classmethod
    def empty(cls, num_channels: int) -> "SiteStatistics":
        return cls(np.zeros((NUM_FOLDS, num_channels), np.float32), np.zeros(num_channels, np.float64))

    def update(self, x: NDArray[np.float32], fold: int, site: Site) -> None:
        """Add tokens `[n, K]` of one sequence. CalibrationFailed, with the site's name, if one is not finite."""
        highest = np.maximum(x.max(0), -x.min(0))
        if not np.isfinite(highest).all():
            raise not_finite(f"channel {int(np.argmin(np.isfinite(highest)))} of the input", site)
        np.maximum(self.absmax[fold % NUM_FOLDS], highest, out=self.absmax[fold % NUM_FOLDS])
        self.square_sum += np.einsum("nk,nk->k", x, x)
        self.num_tokens += len(x)
        some = np.abs(x[::_HISTOGRAM_STRIDE])
        bins = (np.log2(np.maximum(some, 2.0**_LOWEST)) - _LOWEST) * _BINS_PER_OCTAVE
        counts = np.bincount(np.minimum(bins.astype(np.int64), _NUM_BINS - 1).ravel(), minlength=_NUM_BINS)
        self.histogram += counts

    def merge(self, other: "SiteStatistics") -> None:
        """Add the statistics of other tokens."""
        np.maximum(self.absmax, other.absmax, out=self.absmax)
        self.square_sum += other.square_sum
        self.num_tokens += other.num_tokens
        self.histogram += other.histogram

    @property
    def highest(self) -> NDArray[np.float32]:
        """Largest magnitude of each channel over all folds, `[K]`."""
        return np.asarray(self.absmax.max(0))

    def percentile(self, share: float) -> float:
        """The magnitude that `share` of the values do not exceed, with an error of at most one bin (19 %)."""
        total = np.cumsum(self.histogram)
        idx = int(np.searchsorted(total, share * total[-1]))
        return float(2.0 ** (_LOWEST + (idx + 1) / _BINS_PER_OCTAVE))


Statistics = dict[Site, SiteStatistics]


def not_finite(what: str, site: Site) -> CalibrationFailed:
    """The error for a NaN or an infinity in `what`."""
    return CalibrationFailed(
        f"{what} of {site} is not finite on the calibration text: the checkpoint is damaged, or it exceeds float32"
    )
