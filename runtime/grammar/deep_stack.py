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


class NoThreadError(RuntimeError):
    """There is no thread to be had, or no room for its stack."""


def on_deep_stack(work: Callable[[], Result], *, name: str, stack_bytes: int = STACK_BYTES) -> "Future[Result]":
    """Run `work` on a thread of its own with a stack of `stack_bytes`; the result, or what it raises, in a future.

    Raises NoThreadError.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        except BaseException as error:  # a panic of Rust code: nobody who waits should have to expect one
            done.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name=name, daemon=True)
    # The size is the process's: for a moment other threads may be started with it, which does them no harm.
    with _size_lock:
        before = threading.stack_size(stack_bytes)
        try:
            thread.start()
        except RuntimeError as error:
            raise NoThreadError(str(error)) from error
        finally:
            threading.stack_size(before)
    return done
