"""Choose how one layer's input is quantized to int8: its smoothing strength and its clip ratio.

A candidate is judged by the error of the layer's output on sequences that its range was *not* taken from. New text
exceeds the maxima of a few ten thousand tokens, and more often the more evenly smoothing has spread them. A search that
judges on the same sequences chooses strengths and clip ratios that fail on unseen text (SmolLM2-135M's down_proj: KL
0.067 instead of 0.010). Knows nothing about checkpoints or graphs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.model.description import ModelConfig, Site
from export.quantize.int8.smoothquant import smoothing_vector
from export.quantize.rounding.int8 import rounded_activations, rounded_to_nearest
from export.quantize.statistics.activation_stats import NUM_FOLDS
from export.quantize.statistics.collect import Seen

Array = NDArray[np.float32]

STRENGTHS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
TWO_PASS_STRENGTHS = (0.2, 0.35, 0.5, 0.65)
"""An input with 16 bits needs little smoothing, and less smoothing is better for the weights."""

CLIP_RATIOS = (1.15, 1.0, 0.9, 0.8, 0.65)
"""Highest value that int8 represents, as a share of the largest magnitude seen. Larger values saturate."""

# The second pass has 254 steps in one step of the first, so it covers the first pass's error of half a step either way.
FINE_STEPS = 254
# 16 bits have room to spare, so unseen text may exceed the calibration text's maximum by this factor.
TWO_PASS_CLIP_RATIO = 1.5

# Output rows that the error is computed on. An LM head has more rows than all other layers together.
MAX_OUTPUTS = 512
# Folds that are held out in turn. Holding out all four takes twice the time.
_HELD_OUT = (0, 1)


class InputRange(NamedTuple):
    """How a site's input becomes int8. The field names are those of calibration.json.

    strength: of smoothing; end: the clip ratio; scale, fine_scale: see `rounded_activations`
    error: output error on held-out tokens, relative to the residual stream (o, down) or to the output
    """

    strength: float
    end: float
    scale: float
    fine_scale: float | None
    error: float


@dataclass(frozen=True, slots=True)
class SiteRanges:
    """The ranges found for one site: for one int8 pass, and for two."""

    one_pass: InputRange
    two_pass: InputRange


def search_ranges(site: Site, seen: Seen, absmax: Array, weight: Array, config: ModelConfig) -> SiteRanges:
    """Find the best ranges; absmax `[NUM_FOLDS, K]` as in SiteStatistics, weight `[N, K]`."""
    search = _Search(site, seen, absmax, weight, config)

    def best(candidates: Iterable[_Candidate]) -> InputRange:
        return search.range_of(min(candidates, key=search.error))

    ranked = sorted((_Candidate(strength, 1.0) for strength in STRENGTHS), key=search.error)
    one_pass = (_Candidate(found.strength, clip_ratio) for found in ranked[:2] for clip_ratio in CLIP_RATIOS)
    two_pass = (_Candidate(strength, TWO_PASS_CLIP_RATIO, is_two_pass=True) for strength in TWO_PASS_STRENGTHS)
    return SiteRanges(best(one_pass), best(two_pass))


def column_maxima(matrices: Iterable[Array]) -> Array:
    """The largest magnitude of each column of matrices `[n, K]` on top of each other."""
    highest: Array | None = None
    for matrix in matrices:
        own = np.maximum(matrix.max(0), -matrix.min(0))
        highest = own if highest is None else np.maximum(highest, own)
    assert highest is not None
    return highest


def scale_of(absmax: Array, vector: Array, clip_ratio: float) -> float:
    """The scale that makes `clip_ratio` times the largest smoothed magnitude 127 steps; 1 if the input is always 0."""
    highest = float((absmax / vector).max()) * clip_ratio
    return highest / 127 if highest > 0 else 1.0


class _Candidate(NamedTuple):
    """Smoothing strength, clip ratio, and whether a second pass takes up what the first left."""

    strength: float
    clip_ratio: float
    is_two_pass: bool = False


class _Search:
    """Computes the output error of each candidate of one site, once."""

    def __init__(self, site: Site, seen: Seen, absmax: Array, weight: Array, config: ModelConfig) -> None:
        self.site, self.seen, self.absmax, self.config = site, seen, absmax, config
        self.weight = weight[:: -(-len(weight) // MAX_OUTPUTS)]
        self.weight_highest = column_maxima([weight])
        self.exact = seen.inputs @ self.weight.T
        scale = seen.residual if config.by_site[site].writes_stream else np.square(self.exact).mean()
        self.token_weight = np.broadcast_to(1 / np.maximum(scale, np.float32(1e-12)), len(seen.inputs))
        self.errors: dict[_Candidate, float] = {}
        self._smoothed: dict[tuple[float, int], tuple[Array, Array, Array]] = {}

    def range_of(self, candidate: _Candidate) -> InputRange:
        """A candidate's range, from the maxima of all folds."""
        highest = self.absmax.max(0)
        scale = scale_of(highest, self._vector(highest, candidate.strength), candidate.clip_ratio)
        fine = scale / FINE_STEPS if candidate.is_two_pass else None
        return InputRange(candidate.strength, candidate.clip_ratio, scale, fine, self.error(candidate))

    def error(self, candidate: _Candidate) -> float:
        if candidate not in self.errors:
            self.errors[candidate] = sum(self._fold_error(fold, candidate) for fold in _HELD_OUT) / len(_HELD_OUT)
        return self.errors[candidate]

    def _fold_error(self, fold: int, candidate: _Candidate) -> float:
        rows = np.flatnonzero(self.seen.fold % NUM_FOLDS == fold)
        if len(rows) == 0:  # fewer sequences than folds: use all of them
            rows = np.arange(len(self.seen.fold))
        x, weight, highest = self._smooth(candidate.strength, fold, rows)
        scale = scale_of(highest, np.ones_like(highest), candidate.clip_ratio)
        out = rounded_activations(x, scale, scale / FINE_STEPS if candidate.is_two_pass else None) @ weight.T
        per_token = np.square(out - self.exact[rows]).mean(1)
        return float((per_token * self.token_weight[rows]).mean())

    def _smooth(self, strength: float, fold: int, rows: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """Smoothed input, rounded weight and smoothed maxima; the vector comes from the other folds' maxima."""
        key = (strength, fold)
        if key not in self._smoothed:
            others = np.delete(self.absmax, fold, axis=0).max(0)
            others = others if others.any() else self.absmax.max(0)
            vector = self._vector(others, strength)
            weight = rounded_to_nearest(self.weight * vector).dequantized()
            self._smoothed[key] = (self.seen.inputs[rows] / vector, weight, others / vector)
        return self._smoothed[key]

    def _vector(self, highest: Array, strength: float) -> Array:
        return smoothing_vector(highest, self.weight_highest, strength, site=self.site, config=self.config)
