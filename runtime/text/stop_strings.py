"""Stop strings in a stream of text, and the text stream of one request: detokenizer, then stop strings."""

from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from runtime.core import TextPiece
from runtime.text.tokenizer import Detokenizer


class StopString(NamedTuple):
    """A string to stop at. `suffixes[n]` is the length of the longest proper suffix of text[:n] that begins `text`."""

    text: str
    suffixes: "array[int]"


class StopStrings:
    """Cuts a stream at the first stop string that is completed; of two completed together, at the one that began first.

    Text that may be the beginning of a stop string is held back. Characters are matched one by one
    (Knuth, Morris and Pratt 1977): how the text is cut into tokens changes nothing, and time is linear.
    """

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        """`keeps_stop`: the stop string stays in the text."""
        self._keeps_stop = keeps_stop
        self._stops = prepared(tuple(stops))
        self._matched = [0] * len(stops)  # per stop string, how much of it the text ends with
        self._held = ""

    def push(self, text: str, *, can_stop: bool = True) -> TextPiece:
        """Add text; return the text that certainly stands before any stop string, and whether one is complete. Without
        `can_stop`, a complete one is ordinary text."""
        if not self._stops:
            return TextPiece(text, False)
        buffer = self._held + text
        for end in range(len(self._held), len(buffer)):
            stop_len = self._advance(buffer[end])
            if stop_len and can_stop:
                self._held = ""
                return TextPiece(buffer[: end + 1 - (0 if self._keeps_stop else stop_len)], True)
        num_final = len(buffer) - max(self._matched)
        self._held = buffer[num_final:]
        return TextPiece(buffer[:num_final], False)

    def finish(self) -> str:
        """The text held back, now that no more will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """Match one more character; return the length of the longest stop string it completes, or 0."""
        completed = 0
        for i, (stop, suffixes) in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = suffixes[matched]
            matched += stop[matched] == char
            if matched == len(stop):
                completed = max(completed, matched)
                matched = suffixes[matched]
            self._matched[i] = matched
        return completed


@lru_cache(maxsize=64)
def prepared(stops: tuple[str, ...]) -> tuple[StopString, ...]:
    """Stop strings with their tables, cached for all choices of a request. A table takes 4 bytes a character."""
    return tuple(StopString(stop, _suffixes(stop)) for stop in stops)


def _suffixes(stop: str) -> "array[int]":
    table, matched = array("i", [0, 0]), 0
    for char in stop[1:]:
        while matched and stop[matched] != char:
            matched = table[matched]
        matched += stop[matched] == char
        table.append(matched)
    return table


class RequestText:
    """The `TextStream` of one request: tokens to whole characters, cut at stop strings.

    min_tokens: number of tokens at the beginning in which stop strings are ignored
    keeps_end: keep the stop string, or the text of the end token, in the text
    end_texts: texts of end tokens that the detokenizer leaves out
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        keeps_end: bool = False,
        end_texts: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, keeps_stop=keeps_end)
        self._num_unended = min_tokens
        self._keeps_end = keeps_end
        self._end_texts = end_texts or {}

    def push(self, token_id: int) -> TextPiece:
        """Add a token; return the characters that are now final."""
        can_stop = self._num_unended <= 0
        self._num_unended -= 1
        return self._stops.push(self._detokenizer.push(token_id), can_stop=can_stop)

    def finish(self, end_id: int | None = None) -> str:
        """Return the characters still held back, up to a stop string that the last of them completes. With `keeps_end`,
        add the text of `end_id`."""
        text, end_text = "", ""
        if end_id is not None and self._keeps_end:
            text, end_text = self._detokenizer.push(end_id), self._end_texts.get(end_id, "")
        # The count is 0 after the last of `min_tokens`, whose stop string is still ignored.
        can_stop = self._num_unended < 0 or end_id is not None
        piece = self._stops.push(text + self._detokenizer.finish() + end_text, can_stop=can_stop)
        return piece.text + self._stops.finish()
