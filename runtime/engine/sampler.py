"""Choosing one token from one row of logits. Knows one request's parameters and nothing about its neighbours.

`make_sampler` picks the chain once per request; a row's result depends on that row and on the request's own
random numbers alone, so a request gets the same tokens alone and in a batch. `num_top` says how many of the likeliest
tokens are all that a request's choices depend on; given only those, it chooses what it would from the whole row.

    row -> [log-probabilities] -> [penalties, bias] -> [constraint, no end yet] -> argmax
                                                    `-> temperature -> [top-k, top-p, min-p, typical-p] -> draw
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.core import SamplingParams, TokenLogprob
from runtime.session.session import TopRow

Row = NDArray[np.float32]
Allowed = NDArray[np.bool_]

MIN_TEMPERATURE = 1e-5
"""Lower temperatures are taken as this one: below it, fp32 rounding would decide, or overflow."""

_BLOCK = 256
"""Weights summed at a time: near the square root of a vocabulary, so that both levels are short."""

_TYPICAL_REACHES = (1.0, 3.0, np.inf)
"""How far from the entropy, in nats, tokens are looked for first: a whole vocabulary is long to sort."""

_NEAR = 1e-3
"""Tokens with this share of the likeliest one's probability are looked at first. A model's row has some dozen of them,
which mostly hold the nucleus and the top k; sorting through a whole vocabulary takes three times as long."""


class Choice(NamedTuple):
    """The chosen token and, if asked for, its log-probability and the likeliest tokens, best first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class BadLogitsError(ValueError):
    """The model returned NaN or infinity for a row."""


class Sampler(Protocol):
    """Chooses the tokens of one request, in order."""

    def sample(self, row: Row, allowed: Allowed | None = None) -> Choice:
        """Choose from logits float32 [vocab_size], left unchanged. BadLogitsError if they are not finite.

        `allowed` bool [vocab_size] are the tokens to choose from, by default all.
        """
        ...

    def sample_top(self, top: TopRow) -> Choice:
        """Choose from the likeliest tokens alone, at least `num_top` of them. BadLogitsError as above."""
        ...


def num_top(params: SamplingParams) -> int | None:
    """How many of the likeliest tokens suffice to choose as from the whole row; None: nothing less than the row.
    Holds behind the first `min_tokens`, which need it all."""
    if _has_edits(params) or params.constraint is not None or params.prompt_logprobs is not None:
        return None
    if params.is_greedy:
        return max(1, params.logprobs or 0)
    return max(params.top_k, params.logprobs or 0) if params.top_k else None


def make_sampler(params: SamplingParams, prompt_ids: Iterable[int], end_ids: Collection[int] = ()) -> Sampler:
    """The chain for one request; plain greedy skips everything else. `end_ids` end it, but not among its first
    `min_tokens` tokens."""
    edits = _Edits(params, prompt_ids) if _has_edits(params) else None
    if params.is_greedy and edits is None and params.logprobs is None:
        sampler: Sampler = _Greedy()
    else:
        sampler = _Chain(params, edits)
    return _Unended(sampler, params.min_tokens, end_ids) if params.min_tokens and end_ids else sampler


def _has_edits(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias or params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


def _check_top(top: TopRow) -> None:
    """A NaN or infinity anywhere in the row is in its sum."""
    if not np.isfinite(top.log_sum) or not np.isfinite(top.logits[0]):
        raise BadLogitsError(f"the model returned {top.logits[0]} as its highest logit, with {top.log_sum} as log sum")


def _argmax(row: Row) -> int:
    """The likeliest token, the lowest id among equals. numpy's argmax returns a NaN if there is one."""
    token_id = int(row.argmax())
    if not np.isfinite(row[token_id]):
        raise BadLogitsError(f"the model returned {row[token_id]} as its highest logit (token {token_id})")
    return token_id


def _only(row: Row, allowed: Allowed | None) -> Row:
    """The logits with those of other tokens at minus infinity."""
    return row if allowed is None else np.where(allowed, row, np.float32(-np.inf))


class _Greedy:
    def sample(self, row: Row, allowed: Allowed | None = None) -> Choice:
        return Choice(_argmax(_only(row, allowed)))

    def sample_top(self, top: TopRow) -> Choice:
        _check_top(top)
        return Choice(int(top.ids[0]))


class _Unended:
    """Chooses among tokens that do not end the request, so many times; then as the sampler behind it does."""

    def __init__(self, sampler: Sampler, num_tokens: int, end_ids: Collection[int]) -> None:
        self._sampler = sampler
        self._num_left = num_tokens
        self._end_ids = np.fromiter(end_ids, np.int64)

    def sample(self, row: Row, allowed: Allowed | None = None) -> Choice:
        if self._num_left:
            self._num_left -= 1
            allowed = self._without_end(np.ones(len(row), np.bool_) if allowed is None else allowed)
        return self._sampler.sample(row, allowed)

    def _without_end(self, allowed: Allowed) -> Allowed:
        """The tokens that may come next, ends left out; a grammar that leaves nothing else has its end."""
        others = allowed.copy()
        others[self._end_ids] = False
        return others if others.any() else allowed

    def sample_top(self, top: TopRow) -> Choice:
        assert not self._num_left, "it needs the whole row"
        return self._sampler.sample_top(top)


class _Chain:
    """Everything but plain greedy."""

    def __init__(self, params: SamplingParams, edits: "_Edits | None") -> None:
        self._params = params
        self._edits = edits
        seed = None if params.seed is None else params.seed % 2**64
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def sample(self, row: Row, allowed: Allowed | None = None) -> Choice:
        edited = _only(row if self._edits is None else self._edits.apply(row), allowed)
        token_id = _argmax(edited) if self._params.is_greedy else self._draw(edited)
        if self._edits is not None:
            self._edits.count(token_id)
        if self._params.logprobs is None:
            return Choice(token_id)
        return with_logprobs(row, token_id, self._params.logprobs)

    def sample_top(self, top: TopRow) -> Choice:
        _check_top(top)
        position = 0 if self._params.is_greedy else self._draw_top(top)
        token_id, num_top = int(top.ids[position]), self._params.logprobs
        if num_top is None:
            return Choice(token_id)
        likeliest = zip(top.ids[:num_top].tolist(), top.logits[:num_top].tolist(), strict=True)
        logprobs = tuple(TokenLogprob(each, logit - top.log_sum) for each, logit in likeliest)
        return Choice(token_id, float(top.logits[position]) - top.log_sum, logprobs)

    def _draw_top(self, top: TopRow) -> int:
        """A position in `top`; the k likeliest in the order of their ids, in which `_draw` goes through them."""
        order = np.argsort(top.ids[: self._params.top_k])
        kept, weights = _filtered(order, top.logits[order], self._params)
        assert kept is not None
        return int(kept[_inverse_cdf(weights, self._rng.random())])

    def _draw(self, logits: Row) -> int:
        """Try the whole vocabulary first: a token that the filters keep stands, and one that they drop is drawn again
        among the kept. Each kept token ends up with its share of the kept, and most rows are spared the sorting."""
        if self._params.top_k == 0 and self._params.typical_p == 1:
            weights = _weights(logits, self._params.temperature)
            token_id = _inverse_cdf(weights, self._rng.random())
            if _is_kept(weights, token_id, self._params):
                return token_id
        ids, weights = filtered(logits, self._params)
        position = _inverse_cdf(weights, self._rng.random())
        return position if ids is None else int(ids[position])


def _inverse_cdf(weights: Row, uniform: float) -> int:
    """The position at which the running sum of weights float32 [N] passes `uniform` (0 to 1) of the whole.

    Two levels, blocks and then one block, for a running sum over a whole vocabulary takes ten times as long.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    block, fraction = _pass(sums, uniform)
    position, _ = _pass(weights[block * _BLOCK : (block + 1) * _BLOCK], fraction)
    return block * _BLOCK + position


def _pass(weights: Row, uniform: float) -> tuple[int, float]:
    """Where the running sum passes `uniform` of the whole, and how far into that weight, 0 to 1."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    target = uniform * cumulative[-1]
    position = int(np.searchsorted(cumulative, target, side="right"))
    if position == len(weights):  # the product rounded up to the sum: take the last weight that is not 0
        position = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    weight = float(weights[position])
    return position, min(max(1 - (float(cumulative[position]) - target) / weight, 0.0), 1.0)


def filtered(logits: Row, params: SamplingParams) -> tuple[NDArray[np.int64] | None, Row]:
    """Apply temperature, top-k, top-p, min-p and typical-p to logits float32 [V].

    Returns the ids of the tokens that are left and their weights, which need not sum to 1. Ids None: all, in
    order.
    """
    ids = _top_k(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    return _filtered(ids, logits if ids is None else logits[ids], params)


def _filtered(
    ids: NDArray[np.int64] | None, logits: Row, params: SamplingParams
) -> tuple[NDArray[np.int64] | None, Row]:
    """What temperature, top-p, min-p and typical-p leave of the tokens that top-k left."""
    probs = _weights(logits, params.temperature)
    if params.top_p < 1:
        ids, probs = _top_p(ids, probs, params.top_p)
    if params.min_p > 0:
        # The likeliest token has weight 1: its logit is the peak, and top-k and top-p never drop it.
        ids, probs = _keep(ids, probs, np.flatnonzero(probs >= params.min_p))
    if params.typical_p < 1:
        ids, probs = _keep(ids, probs, _typical(probs, params.typical_p))
    return ids, probs


def _weights(logits: Row, temperature: float) -> Row:
    """exp((logits - highest) / temperature), float32 [N]: the likeliest token has weight 1."""
    # -inf and far tails become 0, on purpose.
    with np.errstate(over="ignore", under="ignore"):
        weights: Row = logits - logits[_argmax(logits)]
        weights *= np.float32(1 / max(temperature, MIN_TEMPERATURE))
        np.exp(weights, out=weights)
    return weights


def _is_kept(weights: Row, token_id: int, params: SamplingParams) -> bool:
    """Whether top-p and min-p keep a token: it is likely enough, and those before it do not reach `top_p` yet."""
    weight = weights[token_id]
    if weight < params.min_p:
        return False
    if params.top_p == 1:
        return True
    lower, higher = weights[:token_id], weights[token_id:]  # the lower id comes first among equals
    before = np.dot(lower, lower >= weight) + np.dot(higher, higher > weight)
    return bool(before < params.top_p * weights.sum())


def _top_k(logits: Row, k: int) -> NDArray[np.int64]:
    """Ids of the k highest logits, ascending. Partition finds the k-th without sorting."""
    near = np.flatnonzero(logits > logits[_argmax(logits)] + np.log(np.float32(_NEAR)))
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


def _top_p(ids: NDArray[np.int64] | None, probs: Row, top_p: float) -> tuple[NDArray[np.int64], Row]:
    """The fewest likeliest tokens whose probabilities reach `top_p` (nucleus sampling, arXiv:1904.09751).

    Weights: the likeliest token's is 1. Only the likelier tokens are sorted: those near the first if they reach `top_p`
    together, else all with p > (1 - top_p) / V, V being the number of tokens. The rest cannot be in the nucleus: there
    are at most V of them, so together they hold at most 1 - top_p, so the sorted ones hold at least top_p; being the
    likelier ones they come first, and the nucleus is full before the rest begins.
    """
    total = float(probs.sum())
    for floor in (_NEAR, (1 - top_p) / len(probs) * total, -1.0):  # the last if equal weights round to the second
        candidates = np.flatnonzero(probs > floor)
        weights = probs[candidates]
        descending = np.sort(weights)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)
        if len(weights) and cumulative[-1] >= top_p * total:
            break
    num_kept = min(int(np.searchsorted(cumulative, top_p * total, side="left")) + 1, len(weights))
    kept = _highest(weights, num_kept, descending[num_kept - 1])
    return _keep(ids, probs, candidates[kept])


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


def _keep(ids: NDArray[np.int64] | None, probs: Row, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], Row]:
    return (positions if ids is None else ids[positions]), probs[positions]


def with_logprobs(row: Row, token_id: int, num_top: int) -> Choice:
    """A token with the log-softmax of the raw row float32 [vocab_size] there and at the `num_top` likeliest."""
    peak = row[_argmax(row)]
    with np.errstate(over="ignore", under="ignore"):
        shifted = row - peak
        log_sum = float(peak) + float(np.log(np.exp(shifted, out=shifted).sum()))  # pairwise: 1e-6 of the sum
    top: tuple[TokenLogprob, ...] = ()
    if num_top:
        ids = _top_k(row, min(num_top, len(row)))
        ids = ids[np.argsort(-row[ids], kind="stable")]
        top = tuple(TokenLogprob(int(i), float(row[i]) - log_sum) for i in ids)
    return Choice(token_id, float(row[token_id]) - log_sum, top)


class _Edits:
    """Penalties and bias, kept for the tokens they touch instead of the whole vocabulary.

    `_ids[:n]` are the tokens seen, `_counts[:n]` how often each was generated: 0 for those of the prompt
    only.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        # The other two penalties are for generated tokens alone, and would find a count of 0.
        seen = np.unique(np.fromiter(prompt_ids, np.int64)) if params.repetition_penalty != 1 else np.empty(0, np.int64)
        self._num_seen = len(seen)
        self._ids = np.zeros(self._num_seen + 64, np.int64)
        self._ids[: self._num_seen] = seen
        self._counts = np.zeros(len(self._ids), np.float32)
        self._position = {token_id: i for i, token_id in enumerate(seen.tolist())}
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)

    def apply(self, row: Row) -> Row:
        """A copy of the row with penalties and bias."""
        edited = row.copy()
        ids, counts = self._ids[: self._num_seen], self._counts[: self._num_seen]
        if len(ids):
            seen, repetition = edited[ids], np.float32(self._params.repetition_penalty)
            seen = np.where(seen > 0, seen / repetition, seen * repetition)
            seen -= np.float32(self._params.frequency_penalty) * counts
            seen -= np.float32(self._params.presence_penalty) * (counts > 0)
            edited[ids] = seen
        edited[self._bias_ids] += self._biases
        return edited

    def count(self, token_id: int) -> None:
        """Note a generated token."""
        position = self._position.get(token_id)
        if position is None:
            position = self._position[token_id] = self._num_seen
            if position == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[position] = token_id
            self._num_seen += 1
        self._counts[position] += 1
