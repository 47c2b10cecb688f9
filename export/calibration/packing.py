"""Chooses calibration records at random, and packs encoded ones into sequences.

A sequence begins where a conversation or a text begins, as in serving, because calibration must see the massive
activations of first tokens.
"""

import heapq
from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

from export.calibration.records import Record

T = TypeVar("T")

# A sequence with less room than this counts as full.
_FULL = 8

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


def pack(records: Iterable[Sequence[int]], *, num_samples: int, length: int) -> list[list[int]]:
    """At most `num_samples` sequences of at most `length` ids: each record goes to the first that has room.

    A record longer than `length` is cut into pieces of `length`. A piece that fits nowhere is dropped. When all
    sequences are full, no further record is read.
    """
    packed: list[list[int]] = []
    is_open: list[int] = []
    for record in records:
        for start in range(0, len(record), length):
            piece = record[start : start + length]
            at = next((idx for idx in is_open if len(packed[idx]) + len(piece) <= length), None)
            if at is None and len(packed) < num_samples:
                at = len(packed)
                packed.append([])
                is_open.append(at)
            if at is not None:
                packed[at].extend(piece)
                if len(packed[at]) > length - _FULL:
                    is_open.remove(at)
        if not is_open and len(packed) == num_samples:
            break
    return packed


def interleave(groups: Iterable[Sequence[T]], rng: Random) -> list[T]:
    """All items, shuffled within their group, with the groups spread evenly: every prefix has some of each."""
    placed: list[tuple[float, int, T]] = []
    for number, group in enumerate(groups):
        items = list(group)
        rng.shuffle(items)
        placed += [((idx + 0.5) / len(items), number, item) for idx, item in enumerate(items)]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]
