"""Speculative decoding: chooses how many draft tokens each row of a decode run takes, so that it pays.

A row runs its next token and a draft of the tokens that may follow. The request's own sampler then chooses from the
logits of each position in turn, until its choice differs from the draft. So every token is sampled from the model's own
distribution with the request's own random numbers, as without a draft: greedy or not, with penalties, masks or
log-probabilities. That is rejection sampling (arXiv:2211.17192) with a draft that proposes one token with
certainty: accept it with probability p(token), else draw from the rest. One draw does both.

Knows tokens and seconds; nothing of slots or text.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from runtime.core import TokenGuide
from runtime.engine.sequence import LiveSequence
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.draft_state import MAX_DRAFT, DraftState, state_of
from runtime.engine.speculation.prompt_lookup import PromptLookup
from runtime.engine.speculation.run_cost import RunCost

log = logging.getLogger(__name__)

MIN_GAIN = 1.05
"""Least expected speed-up for which drafts are run: estimates are not more precise than this."""


class DraftCandidate(NamedTuple):
    """A draft of which a row may take all or the beginning."""

    rates: Sequence[float] = ()
    """Acceptance rate of each token, if those before it are right."""
    token_ids: Sequence[int] = ()
    """The tokens; empty if the draft model is yet to propose them."""

    @property
    def is_modelled(self) -> bool:
        return len(self.token_ids) < len(self.rates)


class Speculator:
    """Chooses the drafts of a step: tokens that a grammar forces, a copy from the text where it repeats itself, or else
    tokens of the draft model.

    `min_gain` 0 runs every draft, whatever it costs: for tests.
    """

    def __init__(self, draft_model: DraftModel | None = None, *, min_gain: float = MIN_GAIN) -> None:
        self._cost = RunCost()
        self._draft_model = draft_model
        self._min_gain = min_gain

    def attach(self, sequence: LiveSequence) -> None:
        request = sequence.request
        sequence.draft_state = DraftState(PromptLookup(request.prompt_ids, request.options.prediction_ids))

    def draft(self, sequences: Sequence[LiveSequence], max_len: int) -> list[list[int]] | None:
        candidates, lengths = [DraftCandidate()], [0]
        if self._can_pay(len(sequences)):
            candidates = [self._candidate(sequence, max_len) for sequence in sequences]
            lengths = self._best_lengths(candidates)
        if not any(lengths):
            if self._draft_model is not None:
                for sequence in sequences:
                    state_of(sequence).forget_model()
            return None
        drafts = [list(candidate.token_ids[:length]) for length, candidate in zip(lengths, candidates, strict=True)]
        limits = [length if candidate.is_modelled else 0 for length, candidate in zip(lengths, candidates, strict=True)]
        if any(limits):
            # Nothing for a sequence that the draft model has not caught up with yet.
            modelled = self._modelled(sequences, limits)
            drafts = [ours or copied for ours, copied in zip(modelled, drafts, strict=True)]
        for sequence, limit in zip(sequences, limits, strict=True):
            state_of(sequence).is_modelled = limit > 0
        return drafts if any(drafts) else None

    def observe_run(self, *, num_rows: int, num_drafted: int, seconds: float) -> None:
        self._cost.observe(num_rows, num_drafted, seconds)

    def observe_draft(self, sequence: LiveSequence, *, num_drafted: int, num_accepted: int) -> None:
        """Note the draft model's acceptance; `PromptLookup` observes copied tokens itself."""
        state = state_of(sequence)
        if state.is_modelled:
            state.observe_model(num_drafted, num_accepted)

    def _modelled(self, sequences: Sequence[LiveSequence], limits: Sequence[int]) -> list[list[int]]:
        assert self._draft_model is not None
        try:
            return self._draft_model.draft(sequences, limits)
        except Exception:  # requests go on without it
            log.exception("the draft model failed and is not used any more")
            self._draft_model = None
            return [[] for _ in sequences]

    def _candidate(self, sequence: LiveSequence, max_len: int) -> DraftCandidate:
        max_len = min(max_len, MAX_DRAFT, sequence.request.params.max_tokens - sequence.num_generated - 1)
        if max_len <= 0:
            return DraftCandidate()
        state, guide = state_of(sequence), sequence.request.guide
        forced = list(guide.forced()[:max_len]) if guide is not None else []
        copied = _copied(state.lookup, guide, forced, max_len)
        if self._draft_model is None or forced or (copied.rates and copied.rates[0] > state.model_rate):
            return copied
        return DraftCandidate([state.model_rate] * max_len)

    def _can_pay(self, num_rows: int) -> bool:
        """Whether the longest drafts would pay if all their tokens were right; if they would not, no others do."""
        if not self._min_gain:
            return True
        alone_s = self._cost.estimate(num_rows, 0)
        seconds = self._cost.estimate(num_rows, num_rows * MAX_DRAFT)
        if alone_s is None or seconds is None:
            return False
        return (1 + MAX_DRAFT) / seconds > self._min_gain / alone_s

    def _best_lengths(self, candidates: Sequence[DraftCandidate]) -> list[int]:
        """The lengths of drafts with the most expected tokens a second; all 0 if none is fast enough."""
        if not self._min_gain:
            return [len(candidate.rates) for candidate in candidates]
        num_rows = len(candidates)
        alone_s = self._cost.estimate(num_rows, 0)
        if alone_s is None:
            return [0] * num_rows
        # A draft token counts if it and all before it are right. The most likely ones of all rows come first, and those
        # of a row in their order.
        chances = sorted(
            ((chance, row) for row, candidate in enumerate(candidates) for chance in accumulate(candidate.rates, mul)),
            reverse=True,
        )
        num_best, best_rate = 0, self._min_gain * num_rows / alone_s
        expected, num_of_row, num_modelled = float(num_rows), Counter[int](), 0
        for num_drafted, (chance, row) in enumerate(chances, 1):
            expected += chance
            num_of_row[row] += 1
            if candidates[row].is_modelled:
                num_modelled = max(num_modelled, num_of_row[row])
            seconds = self._cost.estimate(num_rows, num_drafted)
            assert seconds is not None
            if self._draft_model is not None:
                seconds += self._draft_model.seconds(num_modelled)
            if expected / seconds > best_rate:
                num_best, best_rate = num_drafted, expected / seconds
        lengths = Counter(row for _, row in chances[:num_best])
        return [lengths[row] for row in range(num_rows)]


def _copied(lookup: PromptLookup, guide: TokenGuide | None, forced: Sequence[int], max_len: int) -> DraftCandidate:
    """The forced tokens, then a copy of what followed them in the text, as far as the grammar allows it."""
    copy, match_len = lookup.draft_behind(forced, max_len - len(forced))
    draft = [*forced, *copy]
    if guide is not None and copy:
        draft = draft[: max(len(forced), guide.num_allowed(draft))]
    rates = [1.0] * len(forced) + [lookup.rate(match_len + idx) for idx in range(len(draft) - len(forced))]
    return DraftCandidate(rates, draft)
