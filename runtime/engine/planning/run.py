"""What the scheduler plans: one call of the session, and which sequences it is for."""

from typing import NamedTuple

from runtime.engine.sequence import LiveSequence
from runtime.session.session import Batch

MAX_PLACES = 2
"""Most places of a run, padding included, for each token of a chunk. Padding costs memory and no time: attention scores
may take rows * width * heads * capacity floats."""


class Run(NamedTuple):
    """One call of the session. Row i of its logits belongs to `sequences[i]`. The rows after those belong to the
    prompts in `scored`, as many to each as stands there; further rows are ignored."""

    batch: Batch
    sequences: list[LiveSequence]
    num_decode: int = 0
    num_prefill_tokens: int = 0
    prefilled: tuple[LiveSequence, ...] = ()
    """The sequences whose prompts it runs, to their end or not."""
    scored: tuple[tuple[LiveSequence, int], ...] = ()
    drafts: tuple[list[int], ...] = ()
    """Draft tokens of each sequence. Each has one more row of logits."""
