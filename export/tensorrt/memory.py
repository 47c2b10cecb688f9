"""Predicts a build's memory before it starts, because a build that the kernel kills gives no reason.

Measured with tensorrt-rtx 1.7.1, what a process grows by while it builds SmolLM2-135M, default limits, one GPU:

    weights    121 MB (w4a16)    164 MB (w8a16)    269 MB (fp16)
    growth     966 MB            1,081 MB          1,380 MB

which is 630 MB plus 2.8 times the weights; the prediction is a fifth above that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import HeadraceError
from runtime.machine.available_memory import available_memory
from runtime.machine.sizes import format_bytes

BASE_BYTES = 750_000_000
"""The library, and what its compiler holds of the graph and its kernels."""

WEIGHT_COPIES = 3.5
"""Further growth, in weight bytes: as read, as constants of the network, as the plan, and one layer in between."""


def predicted_peak(weight_bytes: int) -> int:
    """Bytes that a build is expected to take at its peak, on top of what the process has."""
    return BASE_BYTES + int(WEIGHT_COPIES * weight_bytes)


def check_fits(predicted: int, weight_bytes: int, *, available: int | None = None) -> None:
    """HeadraceError with the numbers if a build would not fit in what is free."""
    free = available_memory() if available is None else available
    if predicted > free:
        raise HeadraceError(
            f"building this engine takes about {format_bytes(predicted)} of memory ({format_bytes(weight_bytes)} of "
            f"weights, {WEIGHT_COPIES:g} times over, and {format_bytes(BASE_BYTES)}) and {format_bytes(free)} are "
            "free; build it on a larger machine (--target tensorrt-rtx needs no GPU), or export a narrower precision"
        )


_PROCESS = Path("/proc/self")
_FORGET_PEAK = "5"  # proc(5): resets VmHWM to what is resident now


@contextmanager
def growth() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak growth of the process since then, in bytes."""
    with suppress(OSError):  # else the peak may be an earlier, larger one
        (_PROCESS / "clear_refs").write_text(_FORGET_PEAK)
    before = _status("VmRSS")
    yield lambda: _status("VmHWM") - before


def _status(field: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
