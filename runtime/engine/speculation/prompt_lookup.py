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
from itertools import pairwise

from runtime.engine.speculation.running_mean import updated

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

    __slots__ = ("_match_len", "_num_predicted", "_pairs", "_rates", "_singles", "_triples", "ids", "match")

    def __init__(self, prompt_ids: Sequence[int], predicted_ids: Sequence[int] = ()) -> None:
        self.ids = [*predicted_ids, *prompt_ids]
        self.match: int | None = None
        self._match_len = 0
        self._num_predicted = len(predicted_ids)
        self._rates: list[float] = [
            1 - UNMEASURED_MISS ** (0.75 * 2**bits) for bits in range(NUM_RATES)
        ]  # of the middle length
        # Keys to the place behind them; of equal keys the last place stays, but the prediction's before the prompt's.
        self._singles: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._triples: dict[tuple[int, int, int], int] = {}
        self._learn(prompt_ids, self._num_predicted)
        if predicted_ids:
            self._learn(predicted_ids, 0)
            self.match, self._match_len = 0, PREDICTED_MATCH
        else:
            self.match, self._match_len = self._find(self._last_ids())

    def _learn(self, ids: Sequence[int], start: int) -> None:
        """Note the places of tokens that stand in `self.ids` from `start` on; their end has nothing behind it yet."""
        end = start + len(ids)
        self._singles.update(zip(ids, range(start + 1, end), strict=False))
        self._pairs.update(zip(pairwise(ids), range(start + 2, end), strict=False))
        self._triples.update(zip(zip(ids, ids[1:], ids[2:], strict=False), range(start + 3, end), strict=False))

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
        place = len(ids)
        text_len = place - self._num_predicted
        if text_len >= 1:
            self._singles[ids[-1]] = place
        if text_len >= 2:
            self._pairs[ids[-2], ids[-1]] = place
        if text_len >= 3:
            self._triples[ids[-3], ids[-2], ids[-1]] = place
        ids.append(token_id)
        if self.match is None:
            self.match, self._match_len = self._find(self._last_ids())

    def _last_ids(self) -> list[int]:
        """The last three tokens of the text, all of a shorter one."""
        return self.ids[max(self._num_predicted, len(self.ids) - 3) :]

    def _find(self, last: list[int]) -> tuple[int | None, int]:
        """A place behind the last three tokens, else behind two, else behind one, and how many those are."""
        if len(last) == 3 and (place := self._triples.get((last[0], last[1], last[2]))) is not None:
            return place, 3
        if len(last) >= 2 and (place := self._pairs.get((last[-2], last[-1]))) is not None:
            return place, 2
        return (self._singles.get(last[-1]) if last else None), 1


def _rate_idx(match_len: int) -> int:
    return min(match_len.bit_length(), NUM_RATES - 1)
