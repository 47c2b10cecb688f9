"""Who waits for a slot, and who gets the next one: by priority, then fairly by tenant; and when there is memory for it.

A request is admitted if all running ones and itself, each as long as it will probably get, fit the memory together. Who
was preempted comes first again. Knows nothing of runs.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count, takewhile

from runtime.engine.answer_lengths import AnswerLengths
from runtime.engine.kv_slots import KvSlots
from runtime.engine.planning.kv_memory import KvMemory
from runtime.engine.sequence import LiveSequence


class Admission:
    """The waiting queue. `waiting` is ordered by priority; then come those that were preempted, the oldest first, then
    the others, first in, first out."""

    def __init__(self, slots: KvSlots, memory: KvMemory, lengths: AnswerLengths) -> None:
        self.waiting: list[LiveSequence] = []
        self._slots, self._memory, self._lengths = slots, memory, lengths
        self._numbers = count()

    def add(self, sequence: LiveSequence) -> None:
        """Queue a sequence: behind those of its priority, or before the new ones if it was preempted."""
        insort(self.waiting, sequence, key=_place)

    def remove(self, sequence: LiveSequence) -> None:
        """Drop a sequence that waits."""
        self.waiting.remove(sequence)

    def admit(self, running: Callable[[], Iterable[LiveSequence]]) -> Iterator[LiveSequence]:
        """Give free slots, the lowest first, to those who wait; yields each. `running` gives who has a slot by now.

        None overtakes the first one for which there is no memory.
        """
        if self.waiting and self._slots.num_free:
            self._expect_more(running)
        while self.waiting and self._slots.num_free:
            sequence = self._next(running)
            expected_len = self._expected_len(sequence)
            if not self._memory.can_admit(expected_len):
                return
            self.waiting.remove(sequence)
            sequence.slot = slot = self._slots.take()
            self._slots.expected[slot] = expected_len
            if sequence.admission_idx is None:
                sequence.admission_idx = next(self._numbers)
            yield sequence

    def _expect_more(self, running: Callable[[], Iterable[LiveSequence]]) -> None:
        """Correct what was expected of requests that are longer by now."""
        if not (self._slots.past_len > self._slots.expected).any():
            return
        for sequence in running():
            slot = sequence.slot
            if slot is not None and self._slots.past_len[slot] > self._slots.expected[slot]:
                self._slots.expected[slot] = self._expected_len(sequence)

    def _expected_len(self, sequence: LiveSequence) -> int:
        """Tokens that it will probably hold in the end. Its last token is never run."""
        num_new = self._lengths.expected(
            num_prompt=sequence.num_prompt,
            max_tokens=sequence.request.params.max_tokens,
            num_generated=sequence.num_generated,
        )
        return sequence.num_prompt + max(0, num_new - 1)

    def _next(self, running: Callable[[], Iterable[LiveSequence]]) -> LiveSequence:
        """Among the most urgent, the first one of the tenant with the fewest slots: no tenant keeps others out by
        asking for every slot."""
        first = self.waiting[0]
        if first.num_preempted:
            return first
        urgent = list(takewhile(lambda s: priority_of(s) == priority_of(first), self.waiting))
        if all(_tenant(s) == _tenant(first) for s in urgent):
            return first
        num_slots = Counter(map(_tenant, running()))
        return min(urgent, key=lambda s: num_slots[_tenant(s)])


def priority_of(sequence: LiveSequence) -> int:
    """Its priority: the lowest is served first."""
    return sequence.request.options.priority


def _place(sequence: LiveSequence) -> tuple[int, bool, int]:
    is_new = sequence.admission_idx is None
    return priority_of(sequence), is_new, 0 if sequence.admission_idx is None else sequence.admission_idx


def _tenant(sequence: LiveSequence) -> str:
    return sequence.request.options.tenant
