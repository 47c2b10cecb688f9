"""Packs encoded records into calibration sequences. Knows nothing about text.

A sequence begins where a conversation or a text begins, as in serving, because calibration must see the massive
activations of first tokens.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

# A sequence with less room than this counts as full.
_FULL = 8


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
