"""What the `ort` dialect's graph is fed, made from a Batch: tokens packed without padding, and where each belongs."""

import numpy as np
from numpy.typing import NDArray

from runtime.session.session import Batch


def ort_inputs(batch: Batch, *, doubles_singles: bool = False) -> dict[str, NDArray[np.int64] | NDArray[np.int32]]:
    """The inputs but the caches, as export/graph/decoder.py names them.

    doubles_singles: where a row has a single token, attention gets it twice, the second time behind the row's end,
        where nobody reads the result. A kernel of its own would compute a single query, and round it otherwise
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
