"""What the `trt` dialects' graphs are fed, made from a Batch: the same for TensorRT, and for ONNX Runtime as its check.

Their signature is in export/graph/portable/decoder.py; the caches are bound by the session that owns them.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from runtime.session.session import Batch

LOGITS, TOP_LOGITS, TOP_IDS, LOG_SUM = "logits", "top_logits", "top_ids", "log_sum"


def trt_inputs(batch: Batch) -> Mapping[str, NDArray[np.int64]]:
    """input_ids and position_ids int64 `[B, S]`, write_idx int64 `[B]`, logits_idx int64 `[R]`.

    An idle row needs no word: what it writes lies behind its valid tokens, and its logits are not asked for.
    """
    past = batch.past_len.astype(np.int64)
    return {
        "input_ids": batch.token_ids,
        "position_ids": past[:, None] + np.arange(batch.token_ids.shape[1]),
        "write_idx": past,
        "logits_idx": batch.logits_idx,
    }
