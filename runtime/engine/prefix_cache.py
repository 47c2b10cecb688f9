"""K and V of prompt beginnings, kept in blocks outside the slots and reused by later prompts that begin alike.

    prompt   [ block 0 ][ block 1 ][ block 2 ][ rest ]
    key       H(salt, 0) H(key 0, 1) H(key 1, 2)          a key stands for everything up to its block's end

A prompt reuses the blocks of its longest known beginning; what follows is computed. Only rows that a prefill computed
are kept: those of a decode step differ in their last bits, and a request must get the same tokens with and without the
cache. Where slots have states, some blocks have a copy of the states at their end, and only up to such a block is a
beginning reused. Memory is bounded, and running requests take it away; the least recently used block goes first, but
never before the blocks that continue it. Knows neither requests nor models: K/V rows are whatever the session's
`read_slot` returns.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from runtime.session.session import KvRows, Session, StateSession

log = logging.getLogger(__name__)

BLOCK_LEN = 32
"""Tokens of a block: a shared beginning is reused up to the last whole block, so at most 31 tokens of it are computed
again. Smaller blocks would be copied in pieces too small for the memory's full speed."""

MIN_REST = 2
"""Tokens of a prompt that are computed in any case. The last one's logits are needed, and a run of a single token takes
another kernel than any longer run, with sums that differ in the last bit: the rest of a prompt is never that short."""


def block_keys(prompt_ids: Sequence[int], salt: str) -> list[bytes]:
    """The keys of a prompt's reusable whole blocks, 16 bytes each, from the first on.

    The salt goes into every key: prompts with different salts have no block in common.
    """
    num_blocks = max(0, len(prompt_ids) - MIN_REST) // BLOCK_LEN
    blocks = np.array(prompt_ids[: num_blocks * BLOCK_LEN], np.int64).reshape(num_blocks, BLOCK_LEN)
    key = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    keys = []
    for block in blocks:
        key = hashlib.blake2b(key + block.tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """A store of at most `max_bytes` of K/V rows, and at most `limit()`; 0 keeps nothing. One thread uses it: the
    engine's."""

    def __init__(self, session: Session, max_bytes: int) -> None:
        self.num_bytes = 0
        self.limit: Callable[[], int] = lambda: max_bytes
        self._block_bytes = BLOCK_LEN * session.info.kv_bytes_per_token
        self._session = session
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, KvRows] = OrderedDict()  # the least recently used first
        self._state_session = session if session.info.has_states and isinstance(session, StateSession) else None
        self._states: dict[bytes, KvRows] = {}  # at the ends of some blocks

    def restore(self, keys: Sequence[bytes], slot: int, first: int, max_blocks: int, multiple: int = 1) -> int:
        """Copy known blocks from number `first` on into a slot; return how many: at most `max_blocks`, and a multiple
        of `multiple`."""
        wanted = keys[first : first + max_blocks]
        num_blocks = next((count for count, key in enumerate(wanted) if key not in self._blocks), len(wanted))
        num_blocks -= num_blocks % multiple
        while self._state_session is not None and num_blocks and keys[first + num_blocks - 1] not in self._states:
            num_blocks -= 1
        for idx in range(first, first + num_blocks):
            self._session.write_slot(slot, idx * BLOCK_LEN, self._blocks[keys[idx]])
        if num_blocks:
            self._touch(keys[: first + num_blocks])
            if self._state_session is not None:
                self._state_session.write_states(slot, self._states[keys[first + num_blocks - 1]])
        return num_blocks

    def has(self, keys: Sequence[bytes]) -> bool:
        """Whether these blocks are there; False for none."""
        return bool(keys) and all(key in self._blocks for key in keys)

    def keep_states(self, keys: Sequence[bytes], slot: int) -> None:
        """Store a slot's states, which are those at the end of the last of these blocks."""
        if self._state_session is None or not self.has(keys) or keys[-1] in self._states:
            return
        states = self._state_session.read_states(slot)
        if self._make_room(keys, states.nbytes):
            self._states[keys[-1]] = states
            self.num_bytes += states.nbytes

    def keep(self, keys: Sequence[bytes], slot: int, first: int, stop: int) -> None:
        """Store the blocks `first .. stop` of a slot that are not there yet."""
        for idx in range(first, stop):
            if keys[idx] in self._blocks:
                continue
            # Without the block before it, which was evicted or did not fit, this one cannot be found.
            if (idx and keys[idx - 1] not in self._blocks) or not self._make_room(keys[:idx], self._block_bytes):
                return
            try:
                rows = self._session.read_slot(slot, idx * BLOCK_LEN, (idx + 1) * BLOCK_LEN)
            except MemoryError:
                # Reuse is an optimization: no request may fail for it.
                log.warning("no memory for the prefix cache beyond %d bytes; it grows no further", self.num_bytes)
                self._max_bytes = self.num_bytes
                return
            self._blocks[keys[idx]] = rows
            self.num_bytes += rows.nbytes
            self._touch(keys[: idx + 1])

    def _make_room(self, earlier: Sequence[bytes], num_bytes: int) -> bool:
        """Evict until so many bytes more fit; False if there is no room beside the `earlier` blocks, which they
        continue."""
        missing = self.num_bytes + num_bytes - min(self._max_bytes, self.limit())
        if missing > 0:
            if missing > self.num_bytes - sum(map(self._bytes_of, earlier)):
                return False
            self._touch(earlier)
            self.evict(missing)
        return True

    def evict(self, num_bytes: int) -> bool:
        """Give up the least recently used blocks, of so many bytes together; whether there were any."""
        wanted, has_any = self.num_bytes - num_bytes, bool(self._blocks)
        while self._blocks and self.num_bytes > wanted:
            key = next(iter(self._blocks))
            self.num_bytes -= self._bytes_of(key)
            del self._blocks[key]
            self._states.pop(key, None)
        return has_any

    def _bytes_of(self, key: bytes) -> int:
        """Of a block, and of the states at its end."""
        return self._blocks[key].nbytes + (self._states[key].nbytes if key in self._states else 0)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark a beginning as just used, its first block last: a block outlives those that continue it."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)
