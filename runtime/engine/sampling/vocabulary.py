"""Drawing from a whole vocabulary, without sorting it: weights, and whether top-p and min-p keep a token.

Weights lie in an array that is used again for the next row: a new one of 200 KB costs more than what is computed in it.
Each thread has its own.
"""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.core import SamplingParams
from runtime.engine.sampling.draw import pass_of
from runtime.engine.sampling.filters import MIN_TEMPERATURE, only
from runtime.engine.sampling.logits import Row, most_likely
from runtime.engine.sampling.native_draw import native_draw

_WIDTH = 256
"""Columns in which weights are summed: near the square root of a vocabulary, so that both levels of a draw are short.
Sums of columns take a third of the time of sums of rows."""
_LOWEST, _HIGHEST = -32, 64
"""A highest exponent between these needs no shift: neither overflows a sum, nor makes likely tokens denormal."""
_FEW = 256
"""So many numbers are looked up one by one faster than a whole row is multiplied."""

_scratch = threading.local()


Attempt = Callable[[float], int | None]
"""Draws a token with a random number from 0 to 1; None if top-p or min-p drop the token."""


def draws_from(logits: Row, params: SamplingParams, allowed: NDArray[np.bool_] | None = None) -> Attempt:
    """Attempts to draw from one row of logits float32 [V]: by the native library where it is built (30 microseconds
    instead of 80 for 49,152 logits), else by numpy. Valid until the thread asks for the next row's. BadLogitsError as
    below.

    allowed: bool [V], the tokens that may be drawn
    """
    scale = 1 / max(params.temperature, MIN_TEMPERATURE)
    if (draw := native_draw()) is not None:
        row = logits if allowed is None else only(logits, allowed)
        return lambda uniform: draw(row, scale, params.top_p, params.min_p, uniform)
    vocabulary = Vocabulary(logits, params.temperature, allowed)

    def attempt(uniform: float) -> int | None:
        token_id = vocabulary.draw(uniform)
        return token_id if vocabulary.keeps(token_id, params) else None

    return attempt


class Vocabulary:
    """The weights exp(logit / temperature), times a constant, of one row of logits float32 [V]. Valid until the thread
    makes the next one. BadLogitsError if the highest logit is not finite.

    allowed: bool [V], the tokens that may be drawn
    """

    def __init__(self, logits: Row, temperature: float, allowed: NDArray[np.bool_] | None = None) -> None:
        best = most_likely(logits)
        if allowed is not None and not allowed[best]:
            logits, allowed = only(logits, allowed), None
            best = most_likely(logits)
        columns = _columns(len(logits))
        self._weights: Row = columns.ravel()[: len(logits)]
        scale = np.float32(1 / max(temperature, MIN_TEMPERATURE))
        # -inf and far tails become 0, on purpose.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if _LOWEST <= logits[best] * scale <= _HIGHEST:
                np.multiply(logits, scale, out=self._weights)
            else:
                np.subtract(logits, logits[best], out=self._weights)
                self._weights *= scale
            np.exp(self._weights, out=self._weights)
        if allowed is not None:
            self._weights *= allowed
        self._columns = columns
        self._sums = np.add.reduce(columns, axis=0)
        self._total = float(self._sums.sum(dtype=np.float64))
        self._highest = float(self._weights[best])

    def draw(self, uniform: float) -> int:
        """The token at which a running sum over all passes `uniform` (0 to 1) of the whole."""
        column, fraction = pass_of(self._sums, uniform)
        row, _ = pass_of(self._columns[:, column], fraction)
        return row * _WIDTH + column

    def keeps(self, token_id: int, params: SamplingParams) -> bool:
        """Whether top-p and min-p keep a token: it is likely enough, and those before it do not reach `top_p` yet."""
        weight, limit = float(self._weights[token_id]), params.top_p * self._total
        if weight < params.min_p * self._highest:
            return False
        if params.top_p == 1 or weight > self._total - limit:
            return True
        is_higher = self._weights > np.float32(weight)
        num_higher = int(np.count_nonzero(is_higher))
        if num_higher <= _FEW:
            before = float(self._weights[np.flatnonzero(is_higher)].sum())
        else:
            before = float(np.dot(self._weights, is_higher))
        num_equal = int(np.count_nonzero(self._weights[:token_id] == np.float32(weight)))  # lower ids come first
        return before + weight * num_equal < limit


def _columns(vocab_size: int) -> Row:
    """An array [rows, _WIDTH] for so many weights; what is beyond them is 0."""
    columns: Row | None = getattr(_scratch, "columns", None)
    num_rows = -(-vocab_size // _WIDTH)
    if columns is None or len(columns) != num_rows or _scratch.vocab_size != vocab_size:
        columns = _scratch.columns = np.zeros((num_rows, _WIDTH), np.float32)
        _scratch.vocab_size = vocab_size
    return columns
