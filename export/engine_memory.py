"""How much memory a build will take, said before it starts: a build that the kernel kills says nothing."""

from runtime.errors import HeadraceError
from runtime.kv_budget import available_memory, format_bytes

BASE_BYTES = 900_000_000
"""The library, its compiler, and this process."""

WEIGHT_COPIES = 4.0
"""Peak over base, in weight bytes."""


def predicted_peak(weight_bytes: int) -> int:
    """Bytes that a build is expected to be resident in at its peak."""
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
