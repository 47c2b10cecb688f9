"""How long an answer will probably be, learned from those that have ended.

Requests of two kinds are kept apart: with a limit of their own (`max_tokens`), of which a share is used, and without
one, which could fill the rest of the context and nearly never do. Knows nothing of slots or memory.
"""

from bisect import bisect_right, insort
from collections import deque

WINDOW = 256
"""Answers of each kind that count: the last ones."""
QUANTILE = 0.9
"""Of all answers as long as this one is already, so many are no longer than expected. A longer one may cause a
preemption, a shorter one holds memory back; the former costs much more."""
FIRST_GUESS = 256
"""Tokens expected before anything was seen."""
MIN_SEEN = 8
"""Answers of a kind before they are believed."""
NEXT_STEP = 64
"""More tokens expected of an answer that is longer than all before it; at least a quarter of it."""


class AnswerLengths:
    """Observes answers and predicts. `max_len` is the engine's limit for prompt and answer together."""

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._lengths = _Window()
        self._shares = _Window()

    def observe(self, *, num_prompt: int, max_tokens: int, num_generated: int) -> None:
        """An answer ended by itself or at its limit."""
        if self._is_open(num_prompt, max_tokens):
            self._lengths.add(num_generated)
        else:
            self._shares.add(num_generated / max(1, max_tokens))

    def expected(self, *, num_prompt: int, max_tokens: int, num_generated: int = 0) -> int:
        """Tokens that an answer will probably have in the end; more than it has, unless that is `max_tokens`."""
        if self._is_open(num_prompt, max_tokens):
            found = self._lengths.beyond(num_generated)
        else:
            share = self._shares.beyond(num_generated / max(1, max_tokens))
            found = None if share is None else share * max_tokens
        if found is None:
            found = max(FIRST_GUESS, num_generated + max(NEXT_STEP, num_generated // 4))
        return min(max_tokens, max(int(found), num_generated + 1))

    def _is_open(self, num_prompt: int, max_tokens: int) -> bool:
        """Whether the request may use all of the context: its client set no limit."""
        return num_prompt + max_tokens >= self._max_len


class _Window:
    """The last values, sorted."""

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        insort(self._sorted, value)
        self._values.append(value)
        if len(self._values) > WINDOW:
            self._sorted.remove(self._values.popleft())

    def beyond(self, value: float) -> float | None:
        """The quantile of the values above this one; None if too few were seen, or none is above it."""
        first = bisect_right(self._sorted, value)
        if len(self._sorted) < MIN_SEEN or first == len(self._sorted):
            return None
        return self._sorted[first + int(QUANTILE * (len(self._sorted) - 1 - first))]
