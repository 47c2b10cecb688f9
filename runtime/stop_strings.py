"""Stop strings in a stream of text, and the text stream of one request: detokenizer, then stop strings."""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from runtime.core import TextPiece
from runtime.tokenizer import Detokenizer


class StopString(NamedTuple):
    """A string to stop at. `suffixes[n]` is the length of the longest proper suffix of text[:n] that begins `text`."""

    text: str
    suffixes: "array[int]"


class StopStrings:
    """Cuts a stream at the first stop string completed; of two completed together, at the one begun first.

    Text that may yet be the beginning of a stop string is held back. Characters are matched one by one
    (Knuth, Morris and Pratt 1977): how the text is cut into tokens changes nothing, and time is linear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = prepared(tuple(stops))
        self._matched = [0] * len(stops)  # per stop string, how much of it the text ends with
        self._held = ""

    def push(self, text: str) -> TextPiece:
        """Add text; return what is certain to come before any stop string, and whether one is complete."""
        if not self._stops:
            return TextPiece(text, False)
        buffer = self._held + text
        for end in range(len(self._held), len(buffer)):
            stop_len = self._advance(buffer[end])
            if stop_len:
                self._held = ""
                return TextPiece(buffer[: end + 1 - stop_len], True)
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
    """Stop strings with their tables: made once for all choices of a request. Kept ones take 4 bytes a character."""
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
    """The `TextStream` of one request: tokens to whole characters, cut at stop strings."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)

    def push(self, token_id: int) -> TextPiece:
        """Add a token; return the characters that are now final."""
        return self._stops.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return the characters still held back, up to a stop string that the last of them completes."""
        piece = self._stops.push(self._detokenizer.finish())
        return piece.text + self._stops.finish()
