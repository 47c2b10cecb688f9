"""Finds where a text last had some tokens in a row. Made once, with arrays: the GIL is free while they are sorted, and
dictionaries of all pairs and triples of a prompt of 30,000 tokens would hold it for 40 ms."""

from collections.abc import Sequence

import numpy as np


class TokenIndex:
    """The places of tokens in a text that does not change.

    start: added to every place
    """

    def __init__(self, ids: Sequence[int], start: int = 0) -> None:
        self._start = start
        self._ids = np.array(ids, np.int64)
        # The last token has nothing behind it. A stable sort keeps the places of equal tokens in their order.
        self._ends = np.argsort(self._ids[:-1], kind="stable")
        self._sorted = self._ids[self._ends]

    def places(self, last: Sequence[int]) -> list[int | None]:
        """The places behind the last time that the text had the last one, the last two, ... of these tokens in a row;
        None where it never had them."""
        low = int(self._sorted.searchsorted(last[-1]))
        ends = self._ends[low : int(self._sorted.searchsorted(last[-1], side="right"))]
        places: list[int | None] = []
        for back in range(len(last)):
            if back:
                ends = ends[ends >= back]
                ends = ends[self._ids[ends - back] == last[-1 - back]]
            places.append(self._start + int(ends[-1]) + 1 if len(ends) else None)
        return places
