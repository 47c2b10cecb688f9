"""The one thread that owns the engine, and what other threads may ask of it.

Requests and cancellations go in through one queue and take effect between two steps; events come out through
each request's sink. An exception of the engine is caught once, here, of any class (a panic of a Rust library is no
`Exception`). Then every request ends with the reason, and no more are accepted. Nobody waits forever.
"""

import logging
import threading
import time
from collections import deque
from math import ceil

from runtime.core import EngineStats, Request
from runtime.engine.engine import Engine
from runtime.engine.sequence import LiveSequence
from runtime.errors import InvalidRequest, Overloaded, Unavailable

log = logging.getLogger(__name__)


class EngineThread:
    """Starts, feeds and stops the engine. Every method may be called from any thread.

    `max_waiting` requests wait beyond those that have a slot; one more raises Overloaded.
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self._engine = engine
        self._max_live = engine.info.num_slots + max_waiting
        self._inbox: deque[LiveSequence | str] = deque()  # a sequence to add, or the id of one to cancel
        self._num_inbox = 0
        self._changed = threading.Condition()
        self._is_accepting = False
        self._is_closing = False
        self._is_idle = True
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def is_ready(self) -> bool:
        return self._is_accepting

    @property
    def failure(self) -> str | None:
        """Why the engine died, if it did."""
        return self._failure

    def start(self) -> None:
        """Start the thread; requests are accepted from now on. Once only. RuntimeError if the system has no thread."""
        self._thread.start()
        with self._changed:
            # It may have failed by now, or be closed.
            self._is_accepting = self._failure is None and not self._is_closing

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, PromptTooLong, Overloaded or Unavailable."""
        sequence = self._engine.prepare(request)
        with self._changed:
            self._check_accepting()
            num_live = len(self._engine.live) + self._num_inbox
            if num_live >= self._max_live:
                raise Overloaded(
                    f"{num_live} requests are running or waiting, the most that are taken; try again later",
                    retry_after=self._retry_after(),
                )
            if self._is_known(request.request_id):
                raise InvalidRequest(f"request id {request.request_id!r} is in use; choose another")
            self._inbox.append(sequence)
            self._num_inbox += 1
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request at the next step boundary; one that has ended is ignored."""
        with self._changed:
            self._inbox.append(request_id)
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        """Counts at this moment; requests still in the inbox count as waiting."""
        stats = self._engine.stats()
        return stats._replace(num_waiting=stats.num_waiting + self._num_inbox)

    def drain(self, timeout_s: float) -> bool:
        """Stop accepting, wait for what is live, then cancel the rest. True if nothing was cancelled."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._is_accepting = False
            is_done = self._changed.wait_for(self._is_quiet, max(0.0, deadline - time.monotonic()))
            if is_done:
                return True
            self._cancel_all()
            self._changed.wait_for(self._is_quiet)
            return False

    def close(self) -> None:
        """Cancel everything and end the thread. Idempotent; returns when the step under way is done."""
        with self._changed:
            self._is_accepting = False
            self._is_closing = True
            self._cancel_all()
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        try:
            while self._take_inbox():
                self._engine.step()
        except BaseException as error:  # the only place: every request ends with the reason
            try:
                self._fail(f"the engine failed: {type(error).__name__}: {error}")
            finally:  # last: with memory short, this may fail too
                log.exception("the engine failed")

    def _take_inbox(self) -> bool:
        """Hand what arrived to the engine; block while there is nothing to do. False when time to end."""
        with self._changed:
            while True:
                self._empty_inbox()
                if self._engine.has_work:
                    self._is_idle = False
                    return True
                self._is_idle = True
                self._changed.notify_all()
                if self._is_closing:
                    return False
                self._changed.wait_for(lambda: self._inbox or self._is_closing)

    def _empty_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                self._engine.cancel(item)
            else:
                self._engine.add(item)
                self._num_inbox -= 1

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._is_accepting = False
            self._failure = reason
            arrived = self._arrived()
            self._inbox.clear()
            self._num_inbox = 0
            try:
                self._engine.fail(reason, arrived)
            finally:
                self._is_idle = True
                self._changed.notify_all()

    def _cancel_all(self) -> None:
        waiting = [sequence.request.request_id for sequence in self._arrived()]
        self._inbox.extend([*self._engine.live, *waiting])
        self._changed.notify_all()

    def _is_quiet(self) -> bool:
        return (self._is_idle and not self._inbox) or not self._thread.is_alive()

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._engine.live or any(s.request.request_id == request_id for s in self._arrived())

    def _arrived(self) -> list[LiveSequence]:
        """The sequences in the inbox. Reads a copy: on this very thread, which the lock does not stop, the garbage
        collector may close an abandoned reply and so append a cancellation."""
        return [item for item in tuple(self._inbox) if isinstance(item, LiveSequence)]

    def _check_accepting(self) -> None:
        if self._failure is not None:
            raise Unavailable(f"{self._failure}; restart the server")
        if not self._is_accepting:
            raise Unavailable("the server is starting or shutting down; try again later")

    def _retry_after(self) -> int:
        """Seconds until a slot is likely free: one for each full round of slots that waits, at least one."""
        return max(1, ceil(self._engine.stats().num_waiting / self._engine.info.num_slots))
