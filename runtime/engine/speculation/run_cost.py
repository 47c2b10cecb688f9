"""What a decode run takes, with so many rows and so many guesses: measured as it goes, for the choice of drafts.

    seconds = alone + jump + slope * guesses        jump only if there are guesses

for each number of rows. `alone` follows the runs without guesses; jump and slope are a line through what the runs with
guesses took longer, the older ones counting less. A line, and not a table of what each size took: a size that is run
now and then was measured in another minute than its neighbours, and the choice would fall on whatever had luck.
"""

ALONE_GAIN = 0.1
"""Weight of a new run without guesses."""
DRIFT_GAIN = 0.05
"""Of a run with guesses, for `alone`: the machine may have become slower where nothing runs without guesses."""
MEMORY = 0.97
"""What an older run with guesses counts after each further one: the last thirty or so count."""
MAX_SURPRISE = 2.0
"""A run is believed to have taken at most so many times what was expected: some are interrupted."""
PRIOR_SLOPE = 0.5
"""Before anything was measured: a guess costs half of what a row does."""
PRIOR_WEIGHT = 1.0
PRIOR_SPREAD = 16.0
"""How firmly that is believed: as one run of one guess, and one of four (4 squared)."""


class _Line:
    """Seconds of runs with the same number of rows."""

    def __init__(self, alone_s: float, jump_s: float, slope_s: float) -> None:
        self.alone_s, self.jump_s, self.slope_s = alone_s, jump_s, slope_s
        self.is_measured = False
        # Decaying sums over runs with guesses: weight, guesses, their squares, extra seconds, guesses * extra seconds.
        self._sums: tuple[float, ...] = (
            PRIOR_WEIGHT,
            PRIOR_WEIGHT,
            PRIOR_SPREAD,
            PRIOR_WEIGHT * (jump_s + slope_s),
            PRIOR_WEIGHT * jump_s + PRIOR_SPREAD * slope_s,
        )

    def estimate(self, num_guesses: int) -> float:
        return self.alone_s + (self.jump_s + self.slope_s * num_guesses if num_guesses else 0.0)

    def hear(self, num_guesses: int, seconds: float) -> None:
        expected_s = self.estimate(num_guesses)
        seconds = min(seconds, MAX_SURPRISE * expected_s)
        if not num_guesses:
            self.alone_s += ALONE_GAIN * (seconds - self.alone_s)
            return
        self.is_measured = True
        self.alone_s *= 1 + DRIFT_GAIN * (seconds / expected_s - 1)
        extra_s = seconds - self.alone_s
        new = (1.0, num_guesses, num_guesses**2, extra_s, num_guesses * extra_s)
        weight, sum_n, sum_nn, sum_s, sum_ns = self._sums = tuple(
            MEMORY * old + item for old, item in zip(self._sums, new, strict=True)
        )
        spread = weight * sum_nn - sum_n**2
        slope_s = (weight * sum_ns - sum_n * sum_s) / spread if spread > 1e-6 * weight * sum_nn else self.slope_s
        # Neither can be negative: then the other alone explains what is seen.
        self.slope_s = max(0.0, min(slope_s, sum_ns / sum_nn))
        self.jump_s = max(0.0, (sum_s - self.slope_s * sum_n) / weight)


class RunCost:
    """Seconds of decode runs by rows and guesses."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    def hear(self, num_rows: int, num_guesses: int, seconds: float) -> None:
        """A run of so many rows and guesses, of all rows together, took so long."""
        line = self._lines.get(num_rows)
        if line is not None:
            line.hear(num_guesses, seconds)
        elif not num_guesses:
            self._lines[num_rows] = self._new_line(num_rows, seconds)

    def estimate(self, num_rows: int, num_guesses: int) -> float | None:
        """Seconds such a run will take; None before one of so many rows was measured without guesses."""
        line = self._lines.get(num_rows)
        return None if line is None else line.estimate(num_guesses)

    def _new_line(self, num_rows: int, alone_s: float) -> _Line:
        """Where guesses were measured, they are taken to cost what they do with the most similar number of rows."""
        measured = [known for known, line in self._lines.items() if line.is_measured]
        if not measured:
            return _Line(alone_s, 0.0, PRIOR_SLOPE * alone_s / num_rows)
        similar = self._lines[min(measured, key=lambda known: abs(known - num_rows))]
        return _Line(alone_s, similar.jump_s, similar.slope_s)
