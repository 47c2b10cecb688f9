"""Choosing one token from one row of logits. Knows one request's parameters and nothing about its neighbours.

`make_sampler` picks the chain once per request; a row's result depends on that row and on the request's own
random numbers alone, so a request gets the same tokens alone and in a batch. `num_top` says how many of the
most likely tokens a request's choices depend on; given only those, it chooses what it would from the whole row.

    row -> [log-probabilities] -> [penalties, bias] -> [constraint, no end yet] -> argmax
                                                    `-> temperature -> [top-k, top-p, min-p, typical-p] -> draw
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.core import SamplingParams, TokenLogprob
from runtime.engine.sampling.draw import inverse_cdf
from runtime.engine.sampling.filters import filtered, filtered_top, only
from runtime.engine.sampling.logits import Row, check_top, most_likely
from runtime.engine.sampling.logprobs import logprobs_of, logprobs_of_top
from runtime.engine.sampling.penalties import Penalties, has_penalties
from runtime.engine.sampling.vocabulary import draws_from
from runtime.session.session import TopRow

Allowed = NDArray[np.bool_]

MAX_TRIES = 3
"""Draws before the filters are applied. With top-p 0.95 each of them fails one time in twenty at most."""


class SampledToken(NamedTuple):
    """The chosen token and, if asked for, its log-probability and the most likely tokens, best first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Sampler(Protocol):
    """Chooses the tokens of one request, in order."""

    def sample(self, row: Row, allowed: Allowed | None = None) -> SampledToken:
        """Choose from logits float32 [vocab_size], left unchanged. BadLogitsError if they are not finite.

        `allowed` bool [vocab_size] are the tokens to choose from, by default all.
        """
        ...

    def sample_top(self, top: TopRow) -> SampledToken:
        """Choose from the most likely tokens alone, at least `num_top` of them. BadLogitsError as above."""
        ...


def num_top(params: SamplingParams) -> int | None:
    """How many of the most likely tokens are enough to choose as from the whole row; None: the whole row is needed.
    Holds behind the first `min_tokens`, which need it all."""
    if has_penalties(params) or params.constraint is not None or params.prompt_logprobs is not None:
        return None
    if params.is_greedy:
        return max(1, params.logprobs or 0)
    return max(params.top_k, params.logprobs or 0) if params.top_k else None


def make_sampler(params: SamplingParams, prompt_ids: Iterable[int], end_ids: Collection[int] = ()) -> Sampler:
    """The chain for one request; plain greedy skips everything else. `end_ids` end it, but not among its first
    `min_tokens` tokens."""
    penalties = Penalties(params, prompt_ids) if has_penalties(params) else None
    if params.is_greedy and penalties is None and params.logprobs is None:
        sampler: Sampler = _Greedy()
    else:
        sampler = _Chain(params, penalties)
    return _Unended(sampler, params.min_tokens, end_ids) if params.min_tokens and end_ids else sampler


def _best(row: Row, allowed: Allowed | None) -> int:
    """The most likely token, among those allowed."""
    best = most_likely(row)
    return best if allowed is None or allowed[best] else most_likely(only(row, allowed))


class _Greedy:
    def sample(self, row: Row, allowed: Allowed | None = None) -> SampledToken:
        return SampledToken(_best(row, allowed))

    def sample_top(self, top: TopRow) -> SampledToken:
        check_top(top)
        return SampledToken(int(top.ids[0]))


class _Unended:
    """Chooses among tokens that do not end the request, so many times; then as the sampler behind it does."""

    def __init__(self, sampler: Sampler, num_tokens: int, end_ids: Collection[int]) -> None:
        self._sampler = sampler
        self._num_left = num_tokens
        self._end_ids = np.fromiter(end_ids, np.int64)

    def sample(self, row: Row, allowed: Allowed | None = None) -> SampledToken:
        if self._num_left:
            self._num_left -= 1
            allowed = self._without_end(np.ones(len(row), np.bool_) if allowed is None else allowed)
        return self._sampler.sample(row, allowed)

    def _without_end(self, allowed: Allowed) -> Allowed:
        """The tokens that may come next, ends left out; a grammar that leaves nothing else has its end."""
        others = allowed.copy()
        others[self._end_ids] = False
        return others if others.any() else allowed

    def sample_top(self, top: TopRow) -> SampledToken:
        assert not self._num_left, "it needs the whole row"
        return self._sampler.sample_top(top)


class _Chain:
    """Everything but plain greedy."""

    def __init__(self, params: SamplingParams, penalties: Penalties | None) -> None:
        self._params = params
        self._penalties = penalties
        seed = None if params.seed is None else params.seed % 2**64
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def sample(self, row: Row, allowed: Allowed | None = None) -> SampledToken:
        edited = row if self._penalties is None else self._penalties.apply(row)
        token_id = _best(edited, allowed) if self._params.is_greedy else self._draw(edited, allowed)
        if self._penalties is not None:
            self._penalties.count(token_id)
        if self._params.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, *logprobs_of(row, token_id, self._params.logprobs))

    def sample_top(self, top: TopRow) -> SampledToken:
        check_top(top)
        position = 0 if self._params.is_greedy else self._draw_top(top)
        token_id = int(top.ids[position])
        if self._params.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, *logprobs_of_top(top, position, self._params.logprobs))

    def _draw_top(self, top: TopRow) -> int:
        """A position in `top`; the k most likely ones in the order of their ids, in which `_draw` goes through them."""
        order = np.argsort(top.ids[: self._params.top_k])
        kept = filtered_top(order, top.logits[order], self._params)
        assert kept.ids is not None
        return int(kept.ids[inverse_cdf(kept.weights, self._rng.random())])

    def _draw(self, logits: Row, allowed: Allowed | None) -> int:
        """Try the whole vocabulary first: a token that the filters keep stands, and one that they drop is drawn again.
        Each kept token ends up with its share of the kept, and nearly all rows are spared the sorting."""
        if self._params.top_k == 0 and self._params.typical_p == 1:
            attempt = draws_from(logits, self._params, allowed)
            for _ in range(MAX_TRIES):
                if (token_id := attempt(self._rng.random())) is not None:
                    return token_id
        kept = filtered(logits if allowed is None else only(logits, allowed), self._params)
        position = inverse_cdf(kept.weights, self._rng.random())
        return position if kept.ids is None else int(kept.ids[position])
