"""Temperature, top-k, top-p, min-p and typical-p: which tokens may be drawn, and with what weights."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.core import SamplingParams
from runtime.engine.sampling.logits import Row, most_likely

MIN_TEMPERATURE = 1e-5
"""Lower temperatures are taken as this one: below it, fp32 rounding would decide, or overflow."""

_TYPICAL_REACHES = (1.0, 3.0, np.inf)
"""How far from the entropy, in nats, tokens are looked for first: a whole vocabulary is long to sort."""

_NEAR = 1e-3
"""Tokens with this share of the highest probability are looked at first. A model's row has some dozen of them, which
mostly hold the nucleus and the top k; sorting through a whole vocabulary takes three times as long."""


class Kept(NamedTuple):
    """Tokens that may be drawn: their ids, ascending, and weights float32 [N], which need not sum to 1."""

    ids: NDArray[np.int64] | None
    """None: the whole vocabulary."""
    weights: Row

    def narrowed(self, positions: NDArray[np.int64]) -> "Kept":
        """Those at these positions alone."""
        return Kept(positions if self.ids is None else self.ids[positions], self.weights[positions])


def filtered(logits: Row, params: SamplingParams) -> Kept:
    """Apply temperature, top-k, top-p, min-p and typical-p to logits float32 [V]."""
    if not 0 < params.top_k < len(logits):
        return filtered_top(None, logits, params)
    ids = top_k(logits, params.top_k)
    return filtered_top(ids, logits[ids], params)


def only(row: Row, allowed: NDArray[np.bool_]) -> Row:
    """The logits with those of other tokens at minus infinity."""
    return np.where(allowed, row, np.float32(-np.inf))


def filtered_top(ids: NDArray[np.int64] | None, logits: Row, params: SamplingParams) -> Kept:
    """Apply temperature, top-p, min-p and typical-p to the tokens that top-k left, all of them if `ids` is None."""
    kept = Kept(ids, weights_of(logits, params.temperature))
    if params.top_p < 1:
        kept = kept.narrowed(_top_p(kept.weights, params.top_p))
    if params.min_p > 0:
        # The most likely token has weight 1: its logit is the peak, and top-k and top-p never drop it.
        kept = kept.narrowed(np.flatnonzero(kept.weights >= params.min_p))
    if params.typical_p < 1:
        kept = kept.narrowed(_typical(kept.weights, params.typical_p))
    return kept


def weights_of(logits: Row, temperature: float) -> Row:
    """exp((logits - highest) / temperature), float32 [N]: the most likely token has weight 1."""
    # -inf and far tails become 0, on purpose.
    with np.errstate(over="ignore", under="ignore"):
        weights: Row = logits - logits[most_likely(logits)]
        weights *= np.float32(1 / max(temperature, MIN_TEMPERATURE))
        np.exp(weights, out=weights)
    return weights


def top_k(logits: Row, k: int) -> NDArray[np.int64]:
    """Ids of the k highest logits, ascending. Partition finds the k-th without sorting."""
    near = np.flatnonzero(logits > logits[most_likely(logits)] + np.log(np.float32(_NEAR)))
    values = logits[near] if len(near) >= k else logits
    kept = _highest(values, k, np.partition(values, len(values) - k)[len(values) - k])
    return near[kept] if len(near) >= k else kept


def _highest(values: Row, k: int, kth: np.float32) -> NDArray[np.int64]:
    """Positions of the k highest values, ascending, `kth` being the lowest of them.

    The lower position wins among equals, as in a stable sort.
    """
    positions = np.flatnonzero(values >= kth)
    if len(positions) > k:
        is_tied = values[positions] == kth
        num_tied = k - int(np.count_nonzero(~is_tied))
        positions = np.sort(np.concatenate([positions[~is_tied], positions[is_tied][:num_tied]]))
    return positions


def _top_p(weights: Row, top_p: float) -> NDArray[np.int64]:
    """Positions, ascending, of the fewest most likely tokens whose probabilities reach `top_p` (nucleus sampling,
    arXiv:1904.09751).

    The highest weight is 1. Only likely tokens are sorted: those near the first if they reach `top_p` together, else
    all with p > (1 - top_p) / V, V being the number of tokens. The rest cannot be in the nucleus: there are at most V
    of them, so together they hold at most 1 - top_p, so the sorted ones hold at least top_p; being the likelier ones
    they come first, and the nucleus is full before the rest begins.
    """
    total = float(weights.sum())
    for floor in (_NEAR, (1 - top_p) / len(weights) * total, -1.0):  # the last if equal weights round to the second
        candidates = np.flatnonzero(weights > floor)
        likely = weights[candidates]
        descending = np.sort(likely)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)
        if len(likely) and cumulative[-1] >= top_p * total:
            break
    num_kept = min(int(np.searchsorted(cumulative, top_p * total, side="left")) + 1, len(likely))
    return candidates[_highest(likely, num_kept, descending[num_kept - 1])]


def _typical(weights: Row, typical_p: float) -> NDArray[np.int64]:
    """Positions of the fewest tokens that reach `typical_p` of the weights float32 [N], ascending, beginning with those
    whose -log(probability) is nearest to its mean, the entropy (arXiv:2202.00666). The lower position comes first among
    equals. Those within a reach of the entropy come before all others, so only they are sorted if they suffice."""
    known = np.flatnonzero(weights)
    probs = weights[known].astype(np.float64)
    total = probs.sum()
    surprisals = np.log(total) - np.log(probs)
    distances = np.abs(surprisals - np.dot(probs, surprisals) / total)
    for reach in _TYPICAL_REACHES:
        near = np.flatnonzero(distances <= reach)
        order = near[np.argsort(distances[near], kind="stable")]
        cumulative = np.cumsum(probs[order])
        if len(order) and cumulative[-1] >= typical_p * total:
            break
    num_kept = int(np.searchsorted(cumulative, typical_p * total, side="left")) + 1
    return known[np.sort(order[:num_kept])]
