"""Makes a graph's inputs from a Batch, all but the caches: those are bound by the session that owns them.

The `ort` graph takes tokens packed without padding (export/graph/decoder.py). The standard ONNX graphs take padded rows
(export/graph/portable/decoder.py); TensorRT runs those, and ONNX Runtime runs them to check them.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from runtime.session.session import Batch

LOGITS, TOP_LOGITS, TOP_IDS, LOG_SUM = "logits", "top_logits", "top_ids", "log_sum"


class PackedInputs:
    """Makes the inputs of the `ort` graph: the tokens in one row, and the place of each in its sequence.

    A batch that comes again, as in most decode steps, has new values in `token_ids` and `past_len` alone. The rest is
    kept.

    doubles_singles: gives attention the token of a single-token row twice. The copy is written after the row's end, and
        its result is not read. ONNX Runtime runs a single query with another kernel, which rounds differently
    """

    def __init__(self, *, doubles_singles: bool = False) -> None:
        self._doubles_singles = doubles_singles
        self._batch: Batch | None = None
        self._flat_idx: NDArray[np.int64] = np.empty(0, np.int64)
        self._kept: dict[str, NDArray[np.int64] | NDArray[np.int32]] = {}

    def __call__(self, batch: Batch) -> Mapping[str, NDArray[np.int64] | NDArray[np.int32]]:
        if batch is not self._batch:
            self._make(batch)
        return {"input_ids": batch.token_ids.ravel()[self._flat_idx], "past_len": batch.past_len, **self._kept}

    def _make(self, batch: Batch) -> None:
        num_rows, width = batch.token_ids.shape
        is_token = np.arange(width) < batch.query_len[:, None]
        self._batch, self._flat_idx = batch, np.flatnonzero(is_token)
        place_idx = np.argwhere(is_token)
        token_idx = np.zeros((num_rows, max(width, 1 + self._doubles_singles)), np.int64)
        token_idx[place_idx[:, 0], place_idx[:, 1]] = np.arange(len(place_idx))
        wanted = token_idx[batch.logits_idx // width, batch.logits_idx % width]
        query_len = batch.query_len.copy()
        if self._doubles_singles:
            is_single = query_len == 1
            token_idx[is_single, 1] = token_idx[is_single, 0]
            query_len += is_single
        self._kept = {"token_idx": token_idx, "place_idx": place_idx, "query_len": query_len, "logits_idx": wanted}


def packed_inputs(batch: Batch) -> Mapping[str, NDArray[np.int64] | NDArray[np.int32]]:
    """The inputs of one batch."""
    return PackedInputs()(batch)


def padded_inputs(batch: Batch, *, has_states: bool = False) -> Mapping[str, NDArray[np.int64]]:
    """Inputs of the standard ONNX graphs: input_ids and position_ids int64 `[B, S]`, write_idx int64 `[B]`,
    logits_idx int64 `[R]`; for a model with states also query_len int64 `[B]`.

    Idle rows are fed like others: they write after their valid tokens, and their logits are not asked for.
    """
    past = batch.past_len.astype(np.int64)
    lengths = {"query_len": batch.query_len.astype(np.int64)} if has_states else {}
    return {
        "input_ids": batch.token_ids,
        "position_ids": past[:, None] + np.arange(batch.token_ids.shape[1]),
        "write_idx": past,
        "logits_idx": batch.logits_idx,
        **lengths,
    }
