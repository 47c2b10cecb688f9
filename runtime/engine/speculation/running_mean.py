"""The mean by which speculation follows what it measures: times and acceptance rates."""

GAIN = 0.1
"""Weight of a new observation: the last ten or so count."""


def updated(mean: float, value: float) -> float:
    """The mean after one more observation."""
    return mean + GAIN * (value - mean)
