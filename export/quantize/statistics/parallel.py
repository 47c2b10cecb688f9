"""Run numpy work on all cores at once: each worker one BLAS thread, results in order, few of them waiting.

A layer's products keep every core busy by themselves, but what lies between them (norms, SiLU, softmax, maxima) is
single-threaded numpy: whole chunks side by side use the cores for both.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 8
"""More chunks at once would cost more memory than they save time."""


def num_workers() -> int:
    """Cores this process may use, at most `_MOST_WORKERS`."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, computed side by side, handed out in the items' order.

    At most one result more than there are workers is waiting, so memory does not grow with the items. What the function
    raises is raised here; what has not begun by then never does.
    """
    from threadpoolctl import threadpool_limits

    workers = num_workers()
    waiting: deque[Future[Result]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
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
