"""A thread with room for deep recursion. llguidance descends into a schema's references and a grammar's rules by
recursion in Rust, and a stack that is too small for it ends the process.

Each level takes some 3 to 12 KB, and the longest source that is taken has up to 14,000 of them.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

STACK_BYTES = 256 * 2**20
"""Of addresses: memory is taken only as far as the recursion goes."""

Result = TypeVar("Result")

_size_lock = threading.Lock()


def on_deep_stack(
    work: Callable[[], Result], *, name: str, stack_bytes: int = STACK_BYTES, is_daemon: bool = True
) -> "Future[Result]":
    """Run `work` on a thread of its own with a stack of `stack_bytes`; the result, or what it raises, in a future.

    Raises RuntimeError if no thread can be started.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # a panic of Rust code is no Exception
            done.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=is_daemon)
    # The size is the process's: for a moment other threads may be started with it, which does them no harm.
    with _size_lock:
        before = threading.stack_size(stack_bytes)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return done
