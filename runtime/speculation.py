"""Speculative decoding: how many guessed tokens each row of a decode run takes along, so that it pays.

A row runs its next token and a draft of what may follow it; the request's own sampler then chooses from the logits of
each position in turn, and goes on for as long as it chooses what the draft had. So every token is sampled from the
model's own distribution with the request's own random numbers, as without a draft: greedy or not, with penalties,
masks or log-probabilities. That is rejection sampling (arXiv:2211.17192) with a draft that proposes one token with
certainty: accept it with probability p(token), else draw from the rest. One draw does both.

Knows tokens and seconds; nothing of slots or text.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence as Rows

from runtime.sequence import Sequence

MAX_DRAFT = 15
WIDTHS = (2, 3, 4, 6, 8, 12, 16)
"""Tokens a row that are considered, the one that is certain included; the largest is 1 + MAX_DRAFT."""

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


class Speculator:
    """Chooses the drafts of a step. `min_gain` 0 takes every draft along, whatever it costs: for tests."""

    def __init__(self, *, min_gain: float = MIN_GAIN) -> None:
        self.cost = RunCost()
        self._min_gain = min_gain

    def draft(self, sequences: Rows[Sequence], num_rows: int, max_width: int) -> list[list[int]] | None:
        """One draft for each sequence, some of them empty; None if no draft pays.

        num_rows: rows of the run, those that do not decode included: each is as wide as the widest
        max_width: tokens a row that the slots have room for
        """
        known = [_prospect(sequence) for sequence in sequences]
        if not any(limit for limit, _ in known):
            return None
        width = self._best_width(known, num_rows, max_width)
        if width is None:
            return None
        return [
            sequence.ngrams.guess(min(limit, width - 1)) if limit and sequence.ngrams is not None else []
            for sequence, (limit, _) in zip(sequences, known, strict=True)
        ]

    def _best_width(self, known: Rows[tuple[int, float]], num_rows: int, max_width: int) -> int | None:
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
            rate = sum(_expected(min(limit, width - 1), odds) for limit, odds in known) / seconds
            if rate > best:
                best, best_width = rate, width
        return best_width


def _prospect(sequence: Sequence) -> tuple[int, float]:
    """How many tokens may be guessed, and the chance that the first is right."""
    ngrams = sequence.ngrams
    if ngrams is None or ngrams.source is None:
        return 0, 0.0
    left = sequence.request.params.max_tokens - sequence.num_generated - 1
    return min(left, MAX_DRAFT), ngrams.odds


def _expected(num_draft: int, odds: float) -> float:
    """Tokens that come of a run with such a draft, if each guess is right with the same chance: 1 + p + p^2 ..."""
    odds = min(odds, 0.99)
    return (1 - math.pow(odds, num_draft + 1)) / (1 - odds)
