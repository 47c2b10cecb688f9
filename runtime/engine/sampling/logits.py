"""One row of logits: its type, its most likely token, and the error for a row that is broken."""

import numpy as np
from numpy.typing import NDArray

from runtime.session.session import TopRow

Row = NDArray[np.float32]


class BadLogitsError(ValueError):
    """The model returned NaN or infinity for a row."""


def most_likely(row: Row) -> int:
    """The token with the highest logit, the lowest id among equals. BadLogitsError if that logit is not finite."""
    token_id = int(row.argmax())  # of a NaN, if there is one
    if not np.isfinite(row[token_id]):
        raise BadLogitsError(f"the model returned {row[token_id]} as its highest logit (token {token_id})")
    return token_id


def check_top(top: TopRow) -> None:
    """Raise BadLogitsError for a NaN or infinity anywhere in the whole row: its sum shows it."""
    if not np.isfinite(top.log_sum) or not np.isfinite(top.logits[0]):
        raise BadLogitsError(f"the model returned {top.logits[0]} as its highest logit, with {top.log_sum} as log sum")
