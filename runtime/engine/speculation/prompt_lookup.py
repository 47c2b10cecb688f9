"""Drafts from the text itself (prompt lookup): what followed the last time that the same tokens came.

Edits, extracts and continued logs repeat long pieces of their prompt. The lookup remembers where every one, two and
three tokens in a row last stood. When they come again, the draft is what followed that place, and it goes on from there
for as long as it is right. The lookup compares its next token with every token that the model chooses, whether it was
run as a draft or not, so acceptance rates are known while nothing is drafted. Knows token ids and nothing else.

A client may say what answer it expects (OpenAI's `prediction`). The lookup begins to copy that from its first token. It
finds its way back to it as it does to the prompt, which comes second.

Tried on the answers of benchmarks/speculation.py and left out: going on behind a wrong token at the same distance (a
changed number in a line that is copied), and a rate for every length of a match. Each won one task and lost another.
"""

from collections.abc import Sequence

from runtime.engine.speculation.running_mean import updated
from runtime.engine.speculation.token_index import TokenIndex

UNMEASURED_MISS = 0.85
"""Before acceptance is measured: each token of a match multiplies the probability of a wrong next token by this."""
PREDICTED_MATCH = 8
"""Match length at the beginning of a prediction: the client expects that it is right."""
NUM_RATES = 5
"""Acceptance rates are kept for matches of 1, 2 to 3, 4 to 7 and 8 or more tokens (by the bits of the length)."""


class PromptLookup:
    """The text of one request, and where its next tokens may be copied from.

    `ids` are the prediction, if there is one, and the text: prompt and answer. `match` is the place in `ids` of the
    next draft token, None if nothing matches.
    """

    __slots__ = ("_answered", "_known", "_match_len", "_num_predicted", "_rates", "ids", "match")

    def __init__(self, prompt_ids: Sequence[int], predicted_ids: Sequence[int] = ()) -> None:
        self.ids = [*predicted_ids, *prompt_ids]
        self.match: int | None = None
        self._match_len = 0
        self._num_predicted = len(predicted_ids)
        self._rates: list[float] = [
            1 - UNMEASURED_MISS ** (0.75 * 2**bits) for bits in range(NUM_RATES)
        ]  # of the middle length
        # The answer's tokens, pairs and triples to the last place behind them. They come before the prediction's, and
        # those before the prompt's.
        self._answered: dict[tuple[int, ...], int] = {}
        self._known = [TokenIndex(prompt_ids, self._num_predicted)]
        if predicted_ids:
            self._known.insert(0, TokenIndex(predicted_ids))
            self.match, self._match_len = 0, PREDICTED_MATCH
        else:
            self.match, self._match_len = self._find(self._last_ids())

    @property
    def text_ids(self) -> list[int]:
        """Prompt and answer."""
        return self.ids[self._num_predicted :] if self._num_predicted else self.ids

    def rate(self, match_len: int) -> float:
        """Share of the tokens behind matches of about this length that were right."""
        return self._rates[_rate_idx(match_len)]

    def draft(self, max_len: int) -> list[int]:
        """So many tokens that may come next, none without a match. Behind the text's end the draft repeats itself;
        behind the prediction's there is none."""
        if self.match is None:
            return []
        draft = self._copy(self.match, max_len)
        while len(draft) < max_len and self.match >= self._num_predicted:
            draft += draft[: max_len - len(draft)]
        return draft

    def draft_behind(self, token_ids: Sequence[int], max_len: int) -> tuple[list[int], int]:
        """So many tokens that may come once the text has gone on with these, and the length of their match."""
        num = len(token_ids)
        draft = self.draft(num + max_len)
        if draft and draft[:num] == list(token_ids):
            return draft[num:], self._match_len + num
        place, match_len = self._find([*self._last_ids(), *token_ids][-3:])
        return ([] if place is None else self._copy(place, max_len)), match_len

    def _copy(self, place: int, max_len: int) -> list[int]:
        """What stands there, at most to the end of the text or of the prediction."""
        end = place + max_len
        return self.ids[place : min(end, self._num_predicted) if place < self._num_predicted else end]

    def push(self, token_id: int) -> None:
        """The text goes on with this token."""
        ids = self.ids
        if self.match is not None:
            is_right = bool(ids[self.match] == token_id)
            idx = _rate_idx(self._match_len)
            self._rates[idx] = updated(self._rates[idx], is_right)
            is_end = self.match + 1 == self._num_predicted
            self._match_len += 1
            self.match = self.match + 1 if is_right and not is_end else None
        last, place = tuple(self._last_ids()), len(ids)
        for start in range(len(last)):
            self._answered[last[start:]] = place
        ids.append(token_id)
        if self.match is None:
            self.match, self._match_len = self._find(self._last_ids())

    def _last_ids(self) -> list[int]:
        """The last three tokens of the text, all of a shorter one."""
        return self.ids[max(self._num_predicted, len(self.ids) - 3) :]

    def _find(self, last: list[int]) -> tuple[int | None, int]:
        """A place behind the last three tokens, else behind two, else behind one, and how many those are."""
        if not last:
            return None, 1
        known = [index.places(last) for index in self._known]
        for match_len in range(len(last), 0, -1):
            answered = self._answered.get(tuple(last[-match_len:]))
            for place in (answered, *(places[match_len - 1] for places in known)):
                if place is not None:
                    return place, match_len
        return None, 1


def _rate_idx(match_len: int) -> int:
    return min(match_len.bit_length(), NUM_RATES - 1)
