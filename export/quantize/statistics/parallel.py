"""Run numpy functions in parallel, one BLAS thread per worker, and yield the results in order.

Matrix products alone would keep every core busy, but norms, SiLU, softmax and maxima are single-threaded in numpy.
Running whole chunks in parallel uses all cores for both.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 8
"""More would cost much memory and save little time."""


def num_workers() -> int:
    """Cores this process may use, at most `_MOST_WORKERS`."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function` of each item in the items' order, computed in parallel.

    At most `num_workers() + 1` results are held, so memory does not grow with the number of items. An exception of the
    function is raised here, and items that have not started are dropped.
    """
    workers = num_workers()
    waiting: deque[Future[Result]] = deque()
    with _blas_libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def slices_of(length: int, size: int) -> list[slice]:
    """Slices of at most `size` elements that cover `length`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@cache
def _blas_libraries() -> Any:
    """Found once: looking through all loaded libraries takes milliseconds."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
