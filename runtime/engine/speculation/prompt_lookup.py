"""Guessing the next tokens of a text from the text itself (prompt lookup): what followed the last time.

Edits, extracts and continued logs repeat long pieces of their prompt. The index remembers, for every one, two and three
tokens in a row, where they last stood; once they come again, the tokens after that place are the guess, and it goes on
from there while it keeps being right. Every guess is compared with what the model then chose, whether it was run as a
draft or not: so the odds are known for free, also while speculation does not pay. Knows token ids and nothing else.

A client may say what answer it expects (OpenAI's `prediction`). The index begins to copy that from its first token, and
finds its way back to it as it does to the prompt, which comes second.

Tried on the answers of benchmarks/speculation.py and left out: going on behind a wrong guess at the same distance (a
changed number in a line that is copied), odds for every length of the copy, odds that follow faster. Each won one
task and lost another by as much. Single tokens won where words of the prompt are strewn into new text (JSON). How far
this is from what can be had: with the very length of every copy known in advance, int8 weights on a CPU without VNNI
would come to 1.3 times the speed on extracting and 2.4 on the log, since a token more in a run costs 0.22 of one alone.
"""

from collections.abc import Sequence
from itertools import pairwise

from runtime.engine.sequence import LiveSequence

PRIOR_ODDS = (0.15, 0.3, 0.5, 0.75, 0.9)
"""Chance that a guess is right, to begin with: after one, two or three equal tokens, after STREAKS right guesses."""
STREAKS = (2, 6)
PREDICTED_STREAK = STREAKS[0]
"""What a prediction's first token is taken for: better than a place that was found by three tokens."""
MODEL_ODDS = 0.7
"""Chance that a draft model's guess is right, to begin with."""
ODDS_GAIN = 0.1
"""Weight of a new observation: the odds follow the last ten or so."""


class NgramIndex:
    """The text of one request, and where its next tokens may be copied from.

    `ids` are the prediction, if there is one, and the text: prompt and answer. `source` is the place of the guess in
    `ids`, None if there is none.
    """

    __slots__ = ("_num_predicted", "_odds", "_pairs", "_singles", "_streak", "_triples", "ids", "model_odds", "source")

    def __init__(self, prompt_ids: Sequence[int], predicted_ids: Sequence[int] = ()) -> None:
        self.ids = [*predicted_ids, *prompt_ids]
        self.source: int | None = None
        self._num_predicted = len(predicted_ids)
        self._streak = 0  # right guesses since the source was found; before the first, minus 1 to 3: see `_look_up`
        self._odds = list(PRIOR_ODDS)
        self.model_odds = MODEL_ODDS
        # Keys to the place behind them; of equal keys the last place stays, but the prediction's before the prompt's.
        self._singles: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._triples: dict[tuple[int, int, int], int] = {}
        self._learn(prompt_ids, self._num_predicted)
        if predicted_ids:
            self._learn(predicted_ids, 0)
            self.source, self._streak = 0, PREDICTED_STREAK
        else:
            self._look_up()

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

    @property
    def odds(self) -> float:
        """Chance that the next guessed token is right."""
        return self._odds[self._kind()]

    def guess(self, max_len: int) -> list[int]:
        """So many tokens that may come next, none without a source. Behind the text's end the guess repeats itself;
        behind the prediction's there is none."""
        if self.source is None:
            return []
        guess = self._copy(self.source, max_len)
        while len(guess) < max_len and self.source >= self._num_predicted:
            guess += guess[: max_len - len(guess)]
        return guess

    def guess_behind(self, token_ids: Sequence[int], max_len: int) -> tuple[list[int], float]:
        """So many tokens that may come once the text has gone on with these, and the chance that each is right."""
        num = len(token_ids)
        guess = self.guess(num + max_len)
        if guess and guess[:num] == list(token_ids):
            return guess[num:], self.odds
        place, streak = self._find([*self._last_ids(), *token_ids][-3:])
        if place is None:
            return [], 0.0
        return self._copy(place, max_len), self._odds[streak + 3]

    def _copy(self, place: int, max_len: int) -> list[int]:
        """What stands there, at most to the end of the text or of the prediction."""
        end = place + max_len
        return self.ids[place : min(end, self._num_predicted) if place < self._num_predicted else end]

    def push(self, token_id: int) -> None:
        """The text goes on with this token."""
        ids = self.ids
        if self.source is not None:
            is_right = ids[self.source] == token_id
            kind = self._kind()
            self._odds[kind] += ODDS_GAIN * (is_right - self._odds[kind])
            self._streak = max(0, self._streak) + 1
            is_end = self.source + 1 == self._num_predicted
            self.source = self.source + 1 if is_right and not is_end else None
        place = len(ids)
        text_len = place - self._num_predicted
        if text_len >= 1:
            self._singles[ids[-1]] = place
        if text_len >= 2:
            self._pairs[ids[-2], ids[-1]] = place
        if text_len >= 3:
            self._triples[ids[-3], ids[-2], ids[-1]] = place
        ids.append(token_id)
        if self.source is None:
            self._look_up()

    def _look_up(self) -> None:
        place, streak = self._find(self._last_ids())
        if place is not None:
            self.source, self._streak = place, streak

    def _last_ids(self) -> list[int]:
        """The last three tokens of the text, all of a shorter one."""
        return self.ids[max(self._num_predicted, len(self.ids) - 3) :]

    def _find(self, last: list[int]) -> tuple[int | None, int]:
        """A source by the last three tokens, else by two, else by one, and the streak that says which."""
        if len(last) == 3 and (place := self._triples.get((last[0], last[1], last[2]))) is not None:
            return place, -1
        if len(last) >= 2 and (place := self._pairs.get((last[-2], last[-1]))) is not None:
            return place, -2
        return (self._singles.get(last[-1]) if last else None), -3

    def _kind(self) -> int:
        """Which of the odds holds: by how the place was found, later by how long it has been right."""
        if self._streak < 0:
            return self._streak + 3
        return 2 + (self._streak >= STREAKS[0]) + (self._streak >= STREAKS[1])


def state_of(sequence: LiveSequence) -> NgramIndex:
    """What `Speculator.attach` gave the sequence."""
    assert isinstance(sequence.draft_state, NgramIndex)
    return sequence.draft_state
