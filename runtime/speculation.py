"""Speculative decoding: how many guessed tokens each row of a decode run takes along, so that it pays.

A row runs its next token and a draft of what may follow it; the request's own sampler then chooses from the logits of
each position in turn, and goes on for as long as it chooses what the draft had. So every token is sampled from the
model's own distribution with the request's own random numbers, as without a draft: greedy or not, with penalties,
masks or log-probabilities. That is rejection sampling (arXiv:2211.17192) with a draft that proposes one token with
certainty: accept it with probability p(token), else draw from the rest. One draw does both.

Knows tokens and seconds; nothing of slots or text.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence as Rows
from typing import NamedTuple

from runtime.draft_model import DraftModel
from runtime.ngram import ODDS_GAIN
from runtime.sequence import Sequence

log = logging.getLogger(__name__)

MAX_DRAFT = 15
WIDTHS = (2, 3, 4, 6, 8, 12, 16)
"""Tokens a row that are considered, the one that is certain included; the largest is 1 + MAX_DRAFT."""

MAX_MODELLED = 7
"""Tokens that the draft model guesses at most: each costs a run of it, and the chance that all are right falls."""
MODEL_ODDS = 0.7
"""Chance that its guess is right, to begin with. Where it does not pay the odds go back there by ODDS_RECOVERY a step,
so that it is tried again now and then: unlike a copied guess, its cannot be judged for free."""
ODDS_RECOVERY = 0.01
MODEL_COST = 0.3
"""Its time for a token, as a share of the model's, before it was measured."""

MIN_GAIN = 1.05
"""Tokens a second that a draft must be expected to win: estimates are not better than that."""

COST_GAIN = 0.2
STALE_RUNS = 200
"""A measured time not renewed for so many runs is an estimate like any other: one slow run must not last."""


class RunCost:
    """Seconds of a run by its number of tokens: measured ones, and straight lines between them."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._heard: dict[int, int] = {}
        self._num_runs = 0

    def hear(self, num_tokens: int, seconds: float) -> None:
        """A run of so many tokens, padding included, took so long."""
        self._num_runs += 1
        known = self._seconds.get(num_tokens)
        if known is None:
            self._sizes.insert(bisect_left(self._sizes, num_tokens), num_tokens)
        is_fresh = known is not None and self._is_fresh(num_tokens)
        self._seconds[num_tokens] = known + COST_GAIN * (seconds - known) if known and is_fresh else seconds
        self._heard[num_tokens] = self._num_runs

    def estimate(self, num_tokens: int) -> float | None:
        """Seconds such a run will take; None before anything was measured."""
        if num_tokens in self._seconds and self._is_fresh(num_tokens):
            return self._seconds[num_tokens]
        idx = bisect_left(self._sizes, num_tokens)
        below = next((size for size in reversed(self._sizes[:idx]) if self._is_fresh(size)), None)
        above = next((size for size in self._sizes[idx:] if size > num_tokens), None)
        if below is None:
            return None
        if above is None:
            return self._seconds[below] * num_tokens / below
        slope = (self._seconds[above] - self._seconds[below]) / (above - below)
        return self._seconds[below] + max(0.0, slope) * (num_tokens - below)

    def _is_fresh(self, num_tokens: int) -> bool:
        return self._num_runs - self._heard[num_tokens] < STALE_RUNS


class Prospect(NamedTuple):
    """What may be guessed for one row: at most so many tokens, each right with the same chance."""

    limit: int
    odds: float
    is_modelled: bool = False
    """Guessed by the draft model, not copied from the text."""


class Speculator:
    """Chooses the drafts of a step: copied from the request's text where it repeats itself, else the draft model's.

    `min_gain` 0 takes every draft along, whatever it costs: for tests.
    """

    def __init__(self, draft_model: DraftModel | None = None, *, min_gain: float = MIN_GAIN) -> None:
        self.cost = RunCost()
        self._draft_model = draft_model
        self._min_gain = min_gain
        self._modelled: list[Sequence] = []  # whose draft in this step is the model's

    def draft(self, sequences: Rows[Sequence], num_rows: int, max_width: int) -> list[list[int]] | None:
        """One draft for each sequence, some of them empty; None if no draft pays.

        num_rows: rows of the run, those that do not decode included: each is as wide as the widest
        max_width: tokens a row that the slots have room for
        """
        known = [self._prospect(sequence) for sequence in sequences]
        if not any(prospect.limit for prospect in known):
            return None
        width = self._best_width(known, num_rows, max_width)
        if width is None:
            for sequence in sequences:
                sequence.model_odds += ODDS_RECOVERY * (MODEL_ODDS - sequence.model_odds)
            return None
        limits = [min(prospect.limit, width - 1) for prospect in known]
        # Where the draft model is to guess and has not caught up yet, nothing is drafted.
        drafts = [
            sequence.ngrams.guess(limit) if limit and sequence.ngrams is not None and not prospect.is_modelled else []
            for sequence, limit, prospect in zip(sequences, limits, known, strict=True)
        ]
        self._modelled = []
        if self._draft_model is not None:
            modelled = [limit if prospect.is_modelled else 0 for limit, prospect in zip(limits, known, strict=True)]
            if any(modelled):
                guesses = self._guesses(self._draft_model, sequences, modelled)
                self._modelled = [sequence for sequence, guess in zip(sequences, guesses, strict=True) if guess]
                drafts = [guess or draft for guess, draft in zip(guesses, drafts, strict=True)]
        return drafts if any(drafts) else None

    def _guesses(self, draft_model: DraftModel, sequences: Rows[Sequence], limits: Rows[int]) -> list[list[int]]:
        try:
            return draft_model.guess(sequences, limits)
        except Exception:  # nobody needs it
            log.exception("the draft model failed and is not used any more")
            self._draft_model = None
            return [[] for _ in sequences]

    def hear(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """So much of a draft was right. Copied drafts are judged by the index itself, token by token."""
        if num_drafted and any(sequence is one for one in self._modelled):
            for is_right in [True] * num_accepted + [False] * (num_accepted < num_drafted):
                sequence.model_odds += ODDS_GAIN * (is_right - sequence.model_odds)

    def _prospect(self, sequence: Sequence) -> Prospect:
        ngrams = sequence.ngrams
        if ngrams is None:
            return Prospect(0, 0.0)
        left = sequence.request.params.max_tokens - sequence.num_generated - 1
        if ngrams.source is not None and (self._draft_model is None or ngrams.odds > sequence.model_odds):
            return Prospect(min(left, MAX_DRAFT), ngrams.odds)
        if self._draft_model is not None:
            return Prospect(min(left, MAX_MODELLED), sequence.model_odds, is_modelled=True)
        return Prospect(0, 0.0)

    def _best_width(self, known: Rows[Prospect], num_rows: int, max_width: int) -> int | None:
        """The width with the most expected tokens a second, None if that is a single token."""
        if not self._min_gain:
            return min(max_width, WIDTHS[-1]) if max_width > 1 else None
        alone_s = self.cost.estimate(num_rows)
        if alone_s is None:
            return None
        best, best_width = self._min_gain * len(known) / alone_s, None
        for width in WIDTHS:
            if width > max_width:
                break
            seconds = self.cost.estimate(num_rows * width)
            assert seconds is not None
            seconds += self._model_seconds(known, width - 1, alone_s)
            rate = sum(_expected(min(prospect.limit, width - 1), prospect.odds) for prospect in known) / seconds
            if rate > best:
                best, best_width = rate, width
        return best_width

    def _model_seconds(self, known: Rows[Prospect], num_draft: int, alone_s: float) -> float:
        """Time of the draft model for such a step."""
        limit = max((prospect.limit for prospect in known if prospect.is_modelled), default=0)
        if not limit or self._draft_model is None:
            return 0.0
        num_steps = min(limit, num_draft)
        return self._draft_model.seconds(num_steps) or num_steps * alone_s * MODEL_COST


def _expected(num_draft: int, odds: float) -> float:
    """Tokens that come of a run with such a draft, if each guess is right with the same chance: 1 + p + p^2 ..."""
    odds = min(odds, 0.99)
    return (1 - math.pow(odds, num_draft + 1)) / (1 - odds)
