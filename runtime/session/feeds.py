"""Makes a graph's inputs from a Batch, all but the caches: those are bound by the session that owns them.

The `ort` graph takes tokens packed without padding (export/graph/decoder.py). The standard ONNX graphs take padded rows
(export/graph/portable/decoder.py); TensorRT runs those, and ONNX Runtime runs them to check them.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from runtime.session.session import Batch

LOGITS, TOP_LOGITS, TOP_IDS, LOG_SUM = "logits", "top_logits", "top_ids", "log_sum"


def packed_inputs(
    batch: Batch, *, doubles_singles: bool = False
) -> Mapping[str, NDArray[np.int64] | NDArray[np.int32]]:
    """Inputs of the `ort` graph: the tokens in one row, and the place of each in its sequence.

    doubles_singles: gives attention the token of a single-token row twice. The copy is written after the row's end, and
        its result is not read. ONNX Runtime runs a single query with another kernel, which rounds differently
    """
    num_rows, width = batch.token_ids.shape
    is_token = np.arange(width) < batch.query_len[:, None]
    place_idx = np.argwhere(is_token)
    token_idx = np.zeros((num_rows, max(width, 1 + doubles_singles)), np.int64)
    token_idx[place_idx[:, 0], place_idx[:, 1]] = np.arange(len(place_idx))
    wanted = token_idx[batch.logits_idx // width, batch.logits_idx % width]
    query_len = batch.query_len
    if doubles_singles:
        is_single = query_len == 1
        token_idx[is_single, 1] = token_idx[is_single, 0]
        query_len = query_len + is_single
    return {
        "input_ids": batch.token_ids[is_token],
        "token_idx": token_idx,
        "place_idx": place_idx,
        "past_len": batch.past_len,
        "query_len": query_len,
        "logits_idx": wanted,
    }


def padded_inputs(batch: Batch) -> Mapping[str, NDArray[np.int64]]:
    """Inputs of the standard ONNX graphs: input_ids and position_ids int64 `[B, S]`, write_idx int64 `[B]`,
    logits_idx int64 `[R]`.

    Idle rows are fed like others: they write after their valid tokens, and their logits are not asked for.
    """
    past = batch.past_len.astype(np.int64)
    return {
        "input_ids": batch.token_ids,
        "position_ids": past[:, None] + np.arange(batch.token_ids.shape[1]),
        "write_idx": past,
        "logits_idx": batch.logits_idx,
    }
