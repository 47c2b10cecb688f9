"""Measures how much of the evaluation text occurs in the calibration text, which would make figures too good.

Compares runs of consecutive words, case and punctuation aside. Knows nothing about models.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

RUN_WORDS = 8
"""Shorter runs are common phrases ("at the end of the day, it is"); eight words are hardly ever chance."""

_WORD = re.compile(r"\w+")


class Overlap(NamedTuple):
    """Of `num_runs` different runs of words in an evaluation text, `num_shared` occur in the calibration text."""

    num_shared: int
    num_runs: int

    @property
    def share(self) -> float:
        return self.num_shared / self.num_runs if self.num_runs else 0.0


def overlaps(calibration: Iterable[str], evaluation: Mapping[str, str]) -> dict[str, Overlap]:
    """For each evaluation text by name, its overlap with all calibration texts together.

    The calibration texts are read one at a time, and none is kept.
    """
    runs = {name: set(_runs(text)) for name, text in evaluation.items()}
    wanted = set[tuple[str, ...]]().union(*runs.values())
    shared = set[tuple[str, ...]]()
    for text in calibration:
        shared.update(run for run in _runs(text) if run in wanted)
    return {name: Overlap(len(own & shared), len(own)) for name, own in runs.items()}


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return (tuple(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1))
