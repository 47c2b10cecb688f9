"""Who waits for a slot, and who gets the next one: by priority, then fairly by tenant.

Knows nothing of runs.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from runtime.engine.kv_slots import KvSlots
from runtime.engine.sequence import LiveSequence


class Admission:
    """The waiting queue. `waiting` is ordered by priority, then first in, first out."""

    def __init__(self, slots: KvSlots) -> None:
        self.waiting: list[LiveSequence] = []
        self._slots = slots

    def add(self, sequence: LiveSequence) -> None:
        """Queue a sequence behind those of its priority."""
        insort(self.waiting, sequence, key=priority_of)

    def remove(self, sequence: LiveSequence) -> None:
        """Drop a sequence that waits."""
        self.waiting.remove(sequence)

    def admit(self, running: Callable[[], Iterable[LiveSequence]]) -> Iterator[LiveSequence]:
        """Give free slots, the lowest first, to those who wait; yields each. `running` gives who has a slot by now."""
        while self.waiting and self._slots.num_free:
            sequence = self._next(running)
            self.waiting.remove(sequence)
            sequence.slot = self._slots.take()
            yield sequence

    def _next(self, running: Callable[[], Iterable[LiveSequence]]) -> LiveSequence:
        """Among the most urgent, the first one of the tenant with the fewest slots: no tenant keeps others out by
        asking for every slot."""
        first = self.waiting[0]
        urgent = list(takewhile(lambda s: priority_of(s) == priority_of(first), self.waiting))
        if all(_tenant(s) == _tenant(first) for s in urgent):
            return first
        num_slots = Counter(map(_tenant, running()))
        return min(urgent, key=lambda s: num_slots[_tenant(s)])


def priority_of(sequence: LiveSequence) -> int:
    """Its priority: the lowest is served first."""
    return sequence.request.options.priority


def _tenant(sequence: LiveSequence) -> str:
    return sequence.request.options.tenant
