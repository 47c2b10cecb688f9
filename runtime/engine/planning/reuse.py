"""Prompt beginnings between the slots and the prefix cache: what a step copies in, and what it keeps."""

from collections.abc import Iterable
from math import lcm

from runtime.engine.kv_slots import KvSlots
from runtime.engine.planning.kv_memory import KvMemory
from runtime.engine.prefix_cache import BLOCK_LEN, PrefixCache
from runtime.engine.sequence import LiveSequence

RESTORE_SPEED = 16
"""Tokens that a step may copy out of the prefix cache for each one it may prefill: copying is more than 16 times as
fast, so running streams wait no longer for a prompt that is reused than for one that is computed."""


class PrefixReuse:
    """Copies known blocks into slots, and blocks that a prefill has completed out of them."""

    def __init__(
        self, cache: PrefixCache, slots: KvSlots, memory: KvMemory, *, prefill_chunk: int, is_cut_exact: bool
    ) -> None:
        self._cache, self._slots, self._memory = cache, slots, memory
        # Unless runs are chunk-invariant, a cached prompt is cut where a computed one is: at multiples of the chunk.
        self._multiple = 1 if is_cut_exact else lcm(prefill_chunk, BLOCK_LEN) // BLOCK_LEN
        self._max_blocks = max(prefill_chunk * RESTORE_SPEED // BLOCK_LEN, self._multiple)

    def restore(self, sequences: Iterable[LiveSequence]) -> list[LiveSequence]:
        """Fill slots from the prefix cache; return the sequences with more to copy in the next step.

        Called in every step: of two prompts that arrive together, the second reuses what the first has computed.
        """
        left, multiple = self._max_blocks, self._multiple
        unfinished = []
        for sequence in sequences:
            slot, keys = sequence.slot, sequence.prefix_keys
            assert slot is not None
            first, offset = divmod(int(self._slots.past_len[slot]), BLOCK_LEN)
            if offset or first >= len(keys):
                continue
            most = min(left, self._memory.fitting_tokens(slot) // BLOCK_LEN)
            num_restored = self._cache.restore(keys, slot, first, most, multiple)
            self._slots.past_len[slot] += num_restored * BLOCK_LEN
            self._slots.fill(slot)
            if not sequence.num_preempted:
                sequence.request.usage.num_cached += num_restored * BLOCK_LEN
            sequence.num_kept = first = first + num_restored
            left -= num_restored
            if left < multiple and self._cache.has(keys[first : first + multiple]):
                unfinished.append(sequence)
        return unfinished

    def keep(self, sequence: LiveSequence) -> None:
        """Store the blocks of its prompt that are complete now."""
        if sequence.prefix_keys:
            assert sequence.slot is not None
            stop = min(int(self._slots.past_len[sequence.slot]) // BLOCK_LEN, len(sequence.prefix_keys))
            self._cache.keep(sequence.prefix_keys, sequence.slot, sequence.num_kept, stop)
            sequence.num_kept = stop
            if int(self._slots.past_len[sequence.slot]) == stop * BLOCK_LEN:
                self._cache.keep_states(sequence.prefix_keys[:stop], sequence.slot)
