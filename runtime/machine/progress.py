"""Progress bars on standard error, for work that takes longer than a second."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Counts work done."""

    def update(self, n: float = 1, /) -> bool | None: ...


@contextmanager
def progress_bar(what: str, *, total: int | None, unit: str = "it") -> Iterator[Progress]:
    """A bar that appears after one second. Shorter work leaves no line."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", delay=1, leave=None) as bar:
        yield bar
