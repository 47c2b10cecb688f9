"""What a decode run costs by its numbers of rows and of draft tokens, measured as runs go by.

    seconds = alone[rows] + token * num_drafted

`alone` is the time of a run without drafts, for each number of rows. `token` is one figure for all of them: a draft
token costs about the same beside one row as beside many. It is the mean extra time over the mean number of draft
tokens. We keep no average for each number of draft tokens: those of sizes that are seldom run are stale, and picking
the fastest would pick noise.
"""

from runtime.engine.speculation.running_mean import updated

UNMEASURED_TOKEN = 0.5
"""Cost of a draft token before one was run, as a share of a row without drafts."""
MAX_SURPRISE = 2.0
"""A run counts as at most this many times its estimate: some runs are interrupted."""


class RunCost:
    """Seconds of decode runs."""

    def __init__(self) -> None:
        self._alone_s: dict[int, float] = {}
        self._mean_drafted = 1.0
        self._mean_extra_s: float | None = None

    def observe(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """Note a run of so many rows, with so many draft tokens in all rows together."""
        estimate_s = self.estimate(num_rows, num_drafted)
        if estimate_s is None:
            if not num_drafted:
                self._alone_s[num_rows] = seconds
            return
        seconds = min(seconds, MAX_SURPRISE * estimate_s)
        # A run with drafts counts for `alone` too: while every run has drafts, nothing else shows that the machine has
        # become slower.
        self._alone_s[num_rows] *= updated(1.0, seconds / estimate_s)
        if num_drafted:
            token_s, alone_s = self._token_s(num_rows), self._alone_s[num_rows]
            self._mean_extra_s = updated(token_s * self._mean_drafted, max(0.0, seconds - alone_s))
            self._mean_drafted = updated(self._mean_drafted, num_drafted)

    def estimate(self, num_rows: int, num_drafted: int) -> float | None:
        """Seconds such a run will take; None before a run of so many rows without drafts."""
        alone_s = self._alone_s.get(num_rows)
        return None if alone_s is None else alone_s + self._token_s(num_rows) * num_drafted

    def _token_s(self, num_rows: int) -> float:
        if self._mean_extra_s is None:
            return UNMEASURED_TOKEN * self._alone_s[num_rows] / num_rows
        return self._mean_extra_s / self._mean_drafted
