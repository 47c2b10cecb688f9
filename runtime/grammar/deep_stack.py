"""Runs a function on a thread with a deep stack. llguidance follows a schema's references and a grammar's rules by
recursion in Rust, where a stack overflow ends the process.

Each level takes 3 to 12 KB, and the longest source that is accepted has up to 14,000 levels.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

STACK_BYTES = 256 * 2**20
"""Address space: memory is used only as far as the recursion goes."""

Result = TypeVar("Result")

_size_lock = threading.Lock()


class NoThreadError(RuntimeError):
    """The system has no thread, or no room for its stack."""


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
        except BaseException as error:  # a panic of Rust code, as an exception that callers expect
            done.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name=name, daemon=True)
    # The size is a setting of the process: another thread may start with it at this moment, without harm.
    with _size_lock:
        before = threading.stack_size(stack_bytes)
        try:
            thread.start()
        except RuntimeError as error:
            raise NoThreadError(str(error)) from error
        finally:
            threading.stack_size(before)
    return done
