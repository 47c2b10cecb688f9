"""The interface of a loaded model: run rows of tokens against KV slots, in place.

An implementation owns the KV cache: for each layer one K and one V array `[num_slots, kv_heads, capacity,
head_dim]`. It knows nothing about requests, sampling or text. `runtime/backends/ort/session.py` is one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from runtime.machine.kv_pages import PageLayout, plain_layout


@dataclass(frozen=True, slots=True)
class Batch:
    """One run of the model over the slots `first_slot .. first_slot + B`.

    Row b holds `query_len[b]` new tokens, left-aligned in `token_ids[b]`, which follow the `past_len[b]`
    tokens already in its slot. Their K and V are written at `past_len[b]`. The run may also write garbage
    *behind* the valid tokens of a row (padding), never before; the caller keeps
    `past_len[b] + S <= capacity` for every row. A sparse session writes no padding, see `SessionInfo.is_sparse`.

    A row with `query_len[b] == 0` is idle: nothing of it is read, its logits are undefined.

    A batch may run again with new values in `token_ids` and `past_len`; the rest of it never changes.

    token_ids: int64 [B, S], B >= 1, S >= 1; padding is any valid id
    past_len:  int32 [B], tokens already in the slot
    query_len: int32 [B], 0 <= query_len <= S; a session that is not ragged takes S == 1, or B == 1 and
               query_len == S
    logits_idx: int64 [R], R >= 1, positions in the flattened [B * S] whose logits are wanted
    """

    first_slot: int
    token_ids: NDArray[np.int64]
    past_len: NDArray[np.int32]
    query_len: NDArray[np.int32]
    logits_idx: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """The limits of a session, fixed when it is made."""

    device: str
    num_slots: int
    capacity: int
    """Tokens a slot holds: prompt and answer together."""
    vocab_size: int
    is_ragged: bool
    kv_bytes_per_token: int
    max_scored: int | None = None
    """Most tokens of a row if all of them are to give logits; None: as many as fit."""
    max_chunk: int | None = None
    """Most tokens of a row of a run; None: as many as fit."""
    dialect: str = "ort"
    """Which of the artifact's graphs it runs."""
    is_cut_exact: bool = True
    """Whether K, V and logits of a token are the same, bit for bit, wherever its prompt is cut into runs of two tokens
    or more. Not with an int8 cache, where a run sees its own tokens in float32 and those before it rounded: there the
    prefix cache reuses whole chunks only, and nothing is speculated."""
    is_sparse: bool = False
    """Whether a run costs its tokens alone: idle rows between running ones cost nothing, and nothing is written as
    padding. So a run may span all slots, and `past_len[b] + query_len[b] <= capacity` is enough."""
    is_run_exact: bool = False
    """Whether K, V and logits of a token are the same, bit for bit, in a run by itself and in a run with others of its
    row. If so, tokens that decode runs had computed may be computed again by a prefill."""
    has_states: bool = False
    """Whether slots hold states beside K and V: sums over all their tokens, in a fixed size. They follow every token
    that is run, and cannot be cut back to fewer. So nothing is drafted, and a prompt's beginning is reused only up to
    where its states were copied, see `StateSession`. A row with `past_len` 0 begins with states of zero; padding and
    idle rows change none."""
    kv_layout: PageLayout | None = None
    """How the tokens of a slot commit memory. None: the pool is allocated whole."""
    kv_budget: int | None = None
    """Bytes that all slots together may commit; the scheduler keeps to it. None: all slots may be full."""
    threads: int | None = None
    """Threads of the processor that run the model; None on a GPU."""

    @property
    def layout(self) -> PageLayout:
        """How tokens count as bytes."""
        return self.kv_layout or plain_layout(self.kv_bytes_per_token)

    @property
    def kv_bytes(self) -> int:
        """Most bytes of K and V."""
        all_full = self.num_slots * self.layout.committed(self.capacity)
        return all_full if self.kv_budget is None else min(self.kv_budget, all_full)


class KvRows(Protocol):
    """K and V of some positions of a slot, copied out. Only the session that made them looks inside."""

    @property
    def nbytes(self) -> int: ...


class Session(Protocol):
    """A loaded model with its KV slots. Used by one thread at a time."""

    @property
    def info(self) -> SessionInfo: ...

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch; return logits float32 `[R, vocab_size]`, valid until the next call."""
        ...

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of one slot's cache to another slot, and its states."""
        ...

    def read_slot(self, slot: int, start: int, stop: int) -> KvRows:
        """A copy of positions `start .. stop` of a slot's cache, without states; nothing that runs later changes it."""
        ...

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        """Put what `read_slot` gave into a slot, bit for bit, from position `start` on."""
        ...

    def drop_slot(self, slot: int) -> None:
        """Forget what a slot holds, and give its memory back if it can be taken page by page."""
        ...

    def close(self) -> None:
        """Release the cache and the model. Idempotent."""
        ...


@runtime_checkable
class StateSession(Session, Protocol):
    """A session whose states can be copied out, as they are after the last token that was run."""

    def read_states(self, slot: int) -> KvRows:
        """A copy of a slot's states; nothing that runs later changes it."""
        ...

    def write_states(self, slot: int, states: KvRows) -> None:
        """Put what `read_states` gave into a slot, bit for bit, beside the K and V that belong to it."""
        ...


class TopRow(NamedTuple):
    """The top K tokens of one wanted row, best first, and the constant that makes their logits log-probabilities."""

    logits: NDArray[np.float32]  # [K], in falling order
    ids: NDArray[np.int64]  # [K]
    log_sum: float
    """Log of the sum of exp(logit) over the whole vocabulary: log-probability = logit - log_sum."""


@dataclass(frozen=True, slots=True)
class TopRows:
    """The top K tokens of every wanted row: logits float32 and ids int64 `[R, K]`, log_sum float32 `[R]`.

    Among equal logits the lower id comes first, as the sampler has it.
    """

    logits: NDArray[np.float32]
    ids: NDArray[np.int64]
    log_sum: NDArray[np.float32]

    def __iter__(self) -> Iterator[TopRow]:
        return (TopRow(*row) for row in zip(self.logits, self.ids, self.log_sum.tolist(), strict=True))


@runtime_checkable
class TopSession(Session, Protocol):
    """A session that picks the most likely tokens where the model runs, so that a step copies no rows of logits."""

    @property
    def num_top(self) -> int:
        """K: how many of a row's most likely tokens `run_top` gives."""
        ...

    def run_top(self, batch: Batch) -> TopRows:
        """Run the batch as `run` does; return only the most likely tokens, valid until the next call."""
        ...
