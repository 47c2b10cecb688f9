"""What the engine asks of speculation: drafts for the rows of a decode run. The engine knows drafts only through this.

Speculation itself is in `runtime/engine/speculation/`, which imports the engine and not the other way round.
"""

from collections.abc import Sequence
from typing import Protocol

from runtime.engine.sequence import LiveSequence


class Drafter(Protocol):
    """Proposes draft tokens, and observes what they cost and how many were right."""

    def attach(self, sequence: LiveSequence) -> None:
        """Give a new sequence its `draft_state`. Any thread may call this; everything else is the engine thread's."""
        ...

    def draft(self, sequences: Sequence[LiveSequence], max_len: int) -> list[list[int]] | None:
        """One draft for each sequence, some of them empty; None if no draft pays.

        max_len: most tokens of a draft that the slots have room for
        """
        ...

    def observe_run(self, *, num_rows: int, num_drafted: int, seconds: float) -> None:
        """A decode run took so long, with so many draft tokens in all its rows together."""
        ...

    def observe_draft(self, sequence: LiveSequence, *, num_drafted: int, num_accepted: int) -> None:
        """So many tokens of a sequence's draft were run, and so many of them accepted."""
        ...
