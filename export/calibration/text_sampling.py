"""A random sample of a stream of unknown length, within a budget of characters. Knows no tokens."""

import heapq
from collections.abc import Iterable
from random import Random

from export.calibration.records import Record

# Added to each record's cost, so that a stream of empty records is bounded too.
_OVERHEAD_CHARS = 64


class Sample:
    """Keeps records with the smallest random keys as long as they fit a budget: a uniform sample, in one pass.

    Bottom-k sampling (Cohen and Kaplan, 2007), with k left to the records' sizes: short ones leave room for more.
    Memory is the budget and one record, however long the stream is.
    """

    def __init__(self, *, budget_chars: int, rng: Random) -> None:
        self._budget, self._rng = budget_chars, rng
        self._kept: list[tuple[float, int, Record]] = []  # a heap, the largest key on top: keys are negated
        self._num_chars = 0
        self.num_seen = 0

    def add(self, records: Iterable[Record]) -> None:
        """Read the whole stream."""
        for record in records:
            self.num_seen += 1
            key = -self._rng.random()
            if self._num_chars >= self._budget and key < self._kept[0][0]:
                continue  # its key is larger than every kept one, and those fill the budget
            heapq.heappush(self._kept, (key, self.num_seen, record))
            self._num_chars += _cost(record)
            while self._num_chars - _cost(self._kept[0][2]) >= self._budget:
                self._num_chars -= _cost(heapq.heappop(self._kept)[2])

    def records(self) -> list[Record]:
        """The sample, in random order."""
        return [record for _, _, record in sorted(self._kept, key=lambda entry: (-entry[0], entry[1]))]


def _cost(record: Record) -> int:
    return record.num_chars + _OVERHEAD_CHARS
