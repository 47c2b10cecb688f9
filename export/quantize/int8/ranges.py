"""Choose how one layer's input becomes int8: how strongly it is smoothed, and where its range ends.

Every candidate is judged by the error of the layer's output on tokens of sequences that the range was *not* taken
from: maxima of a few ten thousand tokens are exceeded by the next text, the more so the more evenly smoothing has
spread them, and a search that judges on its own maxima picks strengths and cuts that fail on unseen text (measured on
SmolLM2-135M's down_proj: KL 0.067 against 0.010). Knows nothing about checkpoints or graphs.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.model.description import ModelConfig, Site
from export.quantize.int8.smoothquant import smoothing_vector
from export.quantize.rounding.int8 import rounded_activations, rounded_to_nearest
from export.quantize.statistics.activation_stats import NUM_FOLDS

Array = NDArray[np.float32]

STRENGTHS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
WIDE_STRENGTHS = (0.2, 0.35, 0.5, 0.65)
"""With 16 bits the input needs little smoothing, and its weights stay the flatter for it."""

ENDS = (1.15, 1.0, 0.9, 0.8, 0.65)
"""Where the range ends, in shares of the largest magnitude seen; what lies beyond saturates."""

# A coarse step is cut into 254, so that what the first pass leaves (half a step either way) fits the second.
FINE_STEPS = 254
# With 16 bits there is room to spare: unseen text may exceed the calibration text by this factor before it saturates.
WIDE_END = 1.5

# Output rows judged on: candidates differ alike in all of them, and the LM head has more than all other layers.
MAX_OUTPUTS = 1024
# Every second fold is held out in turn: the others only add the time.
_HELD_OUT = (0, 1)


class Range(NamedTuple):
    """A site's int8 form: the smoothing strength, the end of the range, one scale or two (see `rounded_activations`).

    error: output error on held-out tokens, relative to the residual stream (o, down) or to the output
    """

    strength: float
    end: float
    scale: float
    fine_scale: float | None
    error: float


class Sample(NamedTuple):
    """Some tokens of one layer's input.

    x: float32 `[n, K]`; fold: the sequence that each came from, `[n]`
    residual: mean square of the residual stream behind the block, `[n]`, for a layer that writes to it: the next norm
        divides by its root. None compares errors with the output
    """

    x: Array
    fold: NDArray[np.int64]
    residual: Array | None


def search_range(
    site: Site, sample: Sample, absmax: Array, weight: Array, config: ModelConfig, *, is_wide: bool
) -> Range:
    """The best range; absmax `[NUM_FOLDS, K]` as in SiteStatistics, weight `[N, K]`. `is_wide`: two int8 passes."""
    judge = _Judge(site, sample, absmax, weight, config, is_wide=is_wide)
    if is_wide:
        strength = judge.best((strength, WIDE_END) for strength in WIDE_STRENGTHS)[0]
        return judge.finish(strength, WIDE_END)
    ranked = judge.rank((strength, 1.0) for strength in STRENGTHS)
    best = judge.best((strength, end) for strength, _ in ranked[:2] for end in ENDS)
    return judge.finish(*best)


def scale_of(absmax: Array, vector: Array, end: float) -> float:
    """The scale whose 127 steps reach `end` times the largest smoothed magnitude; 1 for an input that is always 0."""
    highest = float((absmax / vector).max()) * end
    return highest / 127 if highest > 0 else 1.0


class _Judge:
    """Output errors of candidates (strength, end) for one site, each computed once."""

    def __init__(
        self, site: Site, sample: Sample, absmax: Array, weight: Array, config: ModelConfig, *, is_wide: bool
    ) -> None:
        self.site, self.sample, self.absmax, self.config, self.is_wide = site, sample, absmax, config, is_wide
        self.weight = weight[:: -(-len(weight) // MAX_OUTPUTS)]
        self.weight_highest = np.abs(weight).max(0)
        self.exact = sample.x @ self.weight.T
        scale = np.square(self.exact).mean() if sample.residual is None else sample.residual
        self.token_weight = np.broadcast_to(1 / np.maximum(scale, np.float32(1e-12)), len(sample.x))
        self.errors: dict[tuple[float, float], float] = {}
        self._smoothed: dict[tuple[float, int], tuple[Array, Array, Array]] = {}

    def rank(self, candidates: Iterable[tuple[float, float]]) -> Sequence[tuple[float, float]]:
        return sorted(candidates, key=self.error)

    def best(self, candidates: Iterable[tuple[float, float]]) -> tuple[float, float]:
        return min(candidates, key=self.error)

    def finish(self, strength: float, end: float) -> Range:
        """The range that all folds' maxima give."""
        highest = self.absmax.max(0)
        scale = scale_of(highest, self._vector(highest, strength), end)
        fine = scale / FINE_STEPS if self.is_wide else None
        return Range(strength, end, scale, fine, self.error((strength, end)))

    def error(self, candidate: tuple[float, float]) -> float:
        if candidate not in self.errors:
            self.errors[candidate] = sum(self._fold_error(fold, *candidate) for fold in _HELD_OUT) / len(_HELD_OUT)
        return self.errors[candidate]

    def _fold_error(self, fold: int, strength: float, end: float) -> float:
        rows = np.flatnonzero(self.sample.fold % NUM_FOLDS == fold)
        if len(rows) == 0:  # fewer sequences than folds: judge on all there are
            rows = np.arange(len(self.sample.fold))
        x, weight, highest = self._at(strength, fold, rows)
        scale = scale_of(highest, np.ones_like(highest), end)
        out = rounded_activations(x, scale, scale / FINE_STEPS if self.is_wide else None) @ weight.T
        per_token = np.square(out - self.exact[rows]).mean(1)
        return float((per_token * self.token_weight[rows]).mean())

    def _at(self, strength: float, fold: int, rows: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """Smoothed input, rounded weight and maxima, with ranges from the other folds."""
        key = (strength, fold)
        if key not in self._smoothed:
            others = np.delete(self.absmax, fold, axis=0).max(0)
            others = others if others.any() else self.absmax.max(0)
            vector = self._vector(others, strength)
            weight = rounded_to_nearest(self.weight * vector).dequantized()
            self._smoothed[key] = (self.sample.x[rows] / vector, weight, others / vector)
        return self._smoothed[key]

    def _vector(self, highest: Array, strength: float) -> Array:
        return smoothing_vector(highest, self.weight_highest, strength, site=self.site, config=self.config)
