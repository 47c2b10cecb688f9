"""A Session without a model: the slots hold tokens, and the logits are a hash of a slot's valid prefix.

Any mistake with a slot, a past length or a copy changes the tokens that come out, and any breach of the
contract in `runtime/session/session.py` raises. Padding and idle rows scribble behind the valid tokens, as a real run
may.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.machine.kv_pages import PageLayout
from runtime.session.session import Batch, KvRows, SessionInfo

GARBAGE = -7
"""What a run writes behind the valid tokens: no token id, so a row that reads it fails."""

HASH_PRIME = 1_000_003

LAYOUT = PageLayout(token_bytes=4, num_streams=2, page_bytes=16)
"""Pages of four tokens, where there is a budget for memory."""


class FakeSession:
    """Deterministic; the same prefix gives the same logits in any slot and any batch.

    With `memory` only so many last tokens count, and a text soon repeats itself.
    """

    def __init__(
        self,
        *,
        num_slots: int = 4,
        capacity: int = 64,
        vocab_size: int = 50,
        is_ragged: bool = True,
        is_sparse: bool = False,
        is_cut_exact: bool = True,
        memory: int | None = None,
        kv_budget: int | None = None,
        is_run_exact: bool = False,
        on_run: Callable[[Batch], None] | None = None,
    ) -> None:
        self._info = SessionInfo(
            "fake",
            num_slots,
            capacity,
            vocab_size,
            is_ragged,
            kv_bytes_per_token=8,
            is_cut_exact=is_cut_exact,
            is_sparse=is_sparse,
            is_run_exact=is_run_exact,
            kv_layout=None if kv_budget is None else LAYOUT,
            kv_budget=kv_budget,
        )
        self.cache = np.full((num_slots, capacity), GARBAGE, np.int64)
        self.batches: list[Batch] = []
        self.copies: list[tuple[int, int, int]] = []
        self.restored: list[tuple[int, int, int]] = []
        self.dropped: list[int] = []
        self.touched = np.zeros(num_slots, np.int32)  # tokens written to each slot since it was dropped
        self.is_closed = False
        self._memory = memory
        self._on_run = on_run

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run(self, batch: Batch) -> NDArray[np.float32]:
        num_rows, width = batch.token_ids.shape
        self._check(batch, num_rows, width)
        # The engine reuses its arrays: keep what they hold now.
        kept = Batch(
            batch.first_slot,
            batch.token_ids.copy(),
            batch.past_len.copy(),
            batch.query_len.copy(),
            batch.logits_idx.copy(),
        )
        self.batches.append(kept)
        if self._on_run is not None:
            self._on_run(kept)
        for row in range(num_rows):
            slot, past, query = batch.first_slot + row, int(batch.past_len[row]), int(batch.query_len[row])
            self.cache[slot, past : past + query] = batch.token_ids[row, :query]
            self._touch(slot, past + query if query else 0)
            if not self.info.is_sparse:
                self.cache[slot, past + query : past + width] = GARBAGE
        return np.stack([self._logits_at(batch, *divmod(int(index), width)) for index in batch.logits_idx])

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        assert source != target
        assert 0 <= source < self.info.num_slots and 0 <= target < self.info.num_slots
        assert 0 <= num_tokens <= self.info.capacity
        self.copies.append((source, target, num_tokens))
        self.cache[target, :num_tokens] = self.cache[source, :num_tokens]
        self.cache[target, num_tokens:] = GARBAGE
        self._touch(target, num_tokens)

    def read_slot(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = self.cache[slot, start:stop].copy()
        assert (rows != GARBAGE).all(), "reads garbage"
        return rows

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        assert isinstance(rows, np.ndarray)
        assert (self.cache[slot, :start] != GARBAGE).all(), "leaves a gap"
        self.restored.append((slot, start, len(rows)))
        self.cache[slot, start : start + len(rows)] = rows
        self._touch(slot, start + len(rows))

    def drop_slot(self, slot: int) -> None:
        self.dropped.append(slot)
        self.cache[slot] = GARBAGE
        self.touched[slot] = 0

    def close(self) -> None:
        self.is_closed = True

    def _touch(self, slot: int, stop: int) -> None:
        self.touched[slot] = max(self.touched[slot], stop)

    def _logits_at(self, batch: Batch, row: int, position: int) -> NDArray[np.float32]:
        if position >= batch.query_len[row]:  # padding or an idle row: undefined, so make it unusable
            return np.full(self.info.vocab_size, np.nan, np.float32)
        end = int(batch.past_len[row]) + position + 1
        return prefix_logits(self.cache[batch.first_slot + row, :end], self.info.vocab_size, self._memory)

    def _check(self, batch: Batch, num_rows: int, width: int) -> None:
        assert not self.is_closed
        assert num_rows >= 1 and width >= 1
        assert batch.first_slot >= 0 and batch.first_slot + num_rows <= self.info.num_slots
        assert batch.token_ids.dtype == np.int64 and batch.logits_idx.dtype == np.int64
        assert batch.past_len.dtype == np.int32 and batch.query_len.dtype == np.int32
        assert batch.past_len.shape == batch.query_len.shape == (num_rows,)
        assert batch.token_ids.min() >= 0 and batch.token_ids.max() < self.info.vocab_size
        assert batch.query_len.min() >= 0 and batch.query_len.max() <= width
        places = batch.query_len if self.info.is_sparse else width
        assert batch.past_len.min() >= 0 and int((batch.past_len + places).max()) <= self.info.capacity
        assert len(batch.logits_idx) >= 1
        assert batch.logits_idx.min() >= 0 and batch.logits_idx.max() < num_rows * width
        if not self.info.is_ragged:
            assert width == 1 or num_rows == 1
            assert (batch.query_len == width).all()
        for row in range(num_rows):
            slot, past = batch.first_slot + row, batch.past_len[row]
            assert (self.cache[slot, :past] != GARBAGE).all() or batch.query_len[row] == 0, "reads garbage"


class ScriptedSession(FakeSession):
    """Answers every prompt with the same token ids, then the last of them for ever.

    The answer is taken to begin behind the last `prompt_end` in a slot.
    """

    def __init__(self, script: Sequence[int], prompt_end: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self._script = script
        self._prompt_end = list(prompt_end)

    def _logits_at(self, batch: Batch, row: int, position: int) -> NDArray[np.float32]:
        end = int(batch.past_len[row]) + position + 1
        ids = self.cache[batch.first_slot + row, :end].tolist()
        width = len(self._prompt_end)
        start = next((i + width for i in range(end - width, -1, -1) if ids[i : i + width] == self._prompt_end), end)
        logits = np.zeros(self.info.vocab_size, np.float32)
        logits[self._script[min(end - start, len(self._script) - 1)]] = 30
        return logits


def prefix_logits(prefix: NDArray[np.int64], vocab_size: int, memory: int | None = None) -> NDArray[np.float32]:
    """Logits float32 [vocab_size] that depend on every token of the prefix and its place.

    With `memory` they depend on so many last tokens alone: such a text repeats itself, and can be guessed.
    """
    assert (prefix != GARBAGE).all(), "a valid position holds garbage"
    state = 0 if memory else len(prefix)
    for token_id in prefix.tolist()[-memory if memory else 0 :]:
        state = (state * HASH_PRIME + token_id + 1) % 2**32
    return np.random.Generator(np.random.PCG64(state)).standard_normal(vocab_size, np.float32) * 3
