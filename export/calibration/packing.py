"""Encoded records to the sequences a model is calibrated on. Knows nothing about text.

Whole records are put together, so that a sequence begins where a conversation or a text begins, as in serving: the
massive activations of a sequence's first tokens are part of what calibration has to see.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

# A rest this short takes no record; looking at it again would only cost time.
_FULL = 8


def pack(records: Iterable[Sequence[int]], *, num_samples: int, length: int) -> list[list[int]]:
    """At most `num_samples` sequences of at most `length` ids: each record goes to the first that has room.

    A record longer than `length` is cut into pieces of `length`. What fits nowhere is left out; without room for
    anything more, no further record is taken from the iterable.
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
    """All items, shuffled within their group and the groups spread evenly, so that any beginning has some of each."""
    placed: list[tuple[float, int, T]] = []
    for number, group in enumerate(groups):
        items = list(group)
        rng.shuffle(items)
        placed += [((idx + 0.5) / len(items), number, item) for idx, item in enumerate(items)]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]
