"""Speculative decoding: how many guessed tokens each row of a decode run takes along, so that it pays.

A row runs its next token and a draft of what may follow it; the request's own sampler then chooses from the logits of
each position in turn, and goes on for as long as it chooses what the draft had. So every token is sampled from the
model's own distribution with the request's own random numbers, as without a draft: greedy or not, with penalties,
masks or log-probabilities. That is rejection sampling (arXiv:2211.17192) with a draft that proposes one token with
certainty: accept it with probability p(token), else draw from the rest. One draw does both.

Knows tokens and seconds; nothing of slots or text.
"""

import logging
from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from runtime.core import TokenGuide
from runtime.engine.sequence import LiveSequence
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.prompt_lookup import MODEL_ODDS, ODDS_GAIN, NgramIndex, state_of
from runtime.engine.speculation.run_cost import RunCost

log = logging.getLogger(__name__)

MAX_DRAFT = 15
"""Tokens that are guessed at most for a row."""

FORCED_ODDS = 0.95
"""Chance that a token a grammar forces is right: its text is, but the model may divide it into tokens otherwise."""

MAX_MODELLED = 7
"""Tokens that the draft model guesses at most: each costs a run of it, and the chance that all are right falls."""
ODDS_RECOVERY = 0.01
"""Where it does not pay its odds go back to MODEL_ODDS by so much a step, so that it is tried again now and then: unlike a
copied guess, its cannot be judged for free."""
MODEL_COST = 0.3
"""Its time for a token, as a share of the model's, before it was measured."""

MIN_GAIN = 1.05
"""Tokens a second that a draft must be expected to win: estimates are not better than that."""


class Prospect(NamedTuple):
    """What may be guessed for one row: at most so many tokens, each right with the same chance, but for those at the
    beginning that a grammar forces."""

    limit: int = 0
    odds: float = 0.0
    token_ids: Sequence[int] = ()
    """The guess, `limit` tokens; empty if the draft model is yet to make it."""
    num_forced: int = 0
    is_modelled: bool = False

    def chance(self, idx: int) -> float:
        """That the token at `idx` is right, if those before it are."""
        return FORCED_ODDS if idx < self.num_forced else self.odds


class Speculator:
    """Chooses the drafts of a step: what a grammar forces, what can be copied from the text where it repeats
    itself, else what the draft model guesses.

    `min_gain` 0 takes every draft along, whatever it costs: for tests.
    """

    def __init__(self, draft_model: DraftModel | None = None, *, min_gain: float = MIN_GAIN) -> None:
        self.cost = RunCost()
        self._draft_model = draft_model
        self._min_gain = min_gain
        self._modelled: list[LiveSequence] = []  # whose draft in this step is the model's

    def attach(self, sequence: LiveSequence) -> None:
        request = sequence.request
        sequence.draft_state = NgramIndex(request.prompt_ids, request.options.prediction_ids)

    def draft(self, sequences: Sequence[LiveSequence], max_len: int) -> list[list[int]] | None:
        """One draft for each sequence, some of them empty; None if no draft pays.

        max_len: tokens of a draft that the slots have room for
        """
        known = [self._prospect(sequence, max_len) for sequence in sequences]
        lengths = self._best_lengths(known) if any(prospect.limit for prospect in known) else None
        if lengths is None:
            for sequence in sequences:
                state = state_of(sequence)
                state.model_odds += ODDS_RECOVERY * (MODEL_ODDS - state.model_odds)
            return None
        # Where the draft model is to guess and has not caught up yet, nothing is drafted.
        drafts = [list(prospect.token_ids[:length]) for length, prospect in zip(lengths, known, strict=True)]
        self._modelled = []
        if self._draft_model is not None:
            modelled = [length if prospect.is_modelled else 0 for length, prospect in zip(lengths, known, strict=True)]
            if any(modelled):
                guesses = self._guesses(self._draft_model, sequences, modelled)
                self._modelled = [sequence for sequence, guess in zip(sequences, guesses, strict=True) if guess]
                drafts = [guess or draft for guess, draft in zip(guesses, drafts, strict=True)]
        return drafts if any(drafts) else None

    def _guesses(
        self, draft_model: DraftModel, sequences: Sequence[LiveSequence], limits: Sequence[int]
    ) -> list[list[int]]:
        try:
            return draft_model.guess(sequences, limits)
        except Exception:  # nobody needs it
            log.exception("the draft model failed and is not used any more")
            self._draft_model = None
            return [[] for _ in sequences]

    def observe_run(self, *, num_rows: int, num_drafted: int, seconds: float) -> None:
        self.cost.hear(num_rows, num_drafted, seconds)

    def observe_draft(self, sequence: LiveSequence, *, num_drafted: int, num_accepted: int) -> None:
        """So much of a draft was right. Copied drafts are judged by the index itself, token by token."""
        if num_drafted and any(sequence is one for one in self._modelled):
            for is_right in [True] * num_accepted + [False] * (num_accepted < num_drafted):
                state = state_of(sequence)
                state.model_odds += ODDS_GAIN * (is_right - state.model_odds)

    def _prospect(self, sequence: LiveSequence, max_len: int) -> Prospect:
        left = min(max_len, sequence.request.params.max_tokens - sequence.num_generated - 1)
        if left <= 0:
            return Prospect()
        state = state_of(sequence)
        copied = _copied(state, sequence.request.guide, min(left, MAX_DRAFT))
        if self._draft_model is None or copied.num_forced or (copied.limit and copied.odds > state.model_odds):
            return copied
        return Prospect(min(left, MAX_MODELLED), state.model_odds, is_modelled=True)

    def _best_lengths(self, known: Sequence[Prospect]) -> list[int] | None:
        """The lengths with the most expected tokens a second, None if that is no draft at all.

        A guess counts if it and all before it are right. The likeliest guesses of all rows join one after the other,
        and where the rate was best the rest is left out.
        """
        if not self._min_gain:
            return [prospect.limit for prospect in known]
        alone_s = self.cost.estimate(len(known), 0)
        if alone_s is None:
            return None
        lengths, expected = [0] * len(known), float(len(known))
        best, best_lengths = self._min_gain * expected / alone_s, None
        # By what the next guess of a row adds, largest first.
        gains = [(-prospect.chance(0), row) for row, prospect in enumerate(known) if prospect.limit]
        heapify(gains)
        num_guesses = num_modelled = 0
        while gains:
            gain, row = gains[0]
            prospect = known[row]
            lengths[row] += 1
            num_guesses += 1
            expected -= gain
            if lengths[row] < prospect.limit:
                heapreplace(gains, (gain * prospect.chance(lengths[row]), row))
            else:
                heappop(gains)
            if prospect.is_modelled:
                num_modelled = max(num_modelled, lengths[row])
            seconds = self.cost.estimate(len(known), num_guesses)
            assert seconds is not None
            rate = expected / (seconds + self._model_seconds(num_modelled, alone_s))
            if rate > best:
                best, best_lengths = rate, list(lengths)
        return best_lengths

    def _model_seconds(self, num_tokens: int, alone_s: float) -> float:
        """Time of the draft model for so many guesses in a row."""
        if not num_tokens or self._draft_model is None:
            return 0.0
        return self._draft_model.seconds(num_tokens) or num_tokens * alone_s * MODEL_COST


def _copied(ngrams: NgramIndex, guide: TokenGuide | None, limit: int) -> Prospect:
    """What is forced, and behind it what the text has had there before, as far as the grammar allows it."""
    forced = list(guide.forced()[:limit]) if guide is not None else []
    copy, odds = ngrams.guess_behind(forced, limit - len(forced))
    guess = forced + copy
    if guide is not None and copy:
        guess = guess[: max(len(forced), guide.num_allowed(guess))]
    return Prospect(len(guess), odds, guess, len(forced))
