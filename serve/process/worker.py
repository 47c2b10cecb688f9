"""The worker process: loads the models, answers, drains and reloads when it is told to, ends when an engine failed.

    SIGTERM, SIGINT   drain: go on answering, so that /readyz and new requests get a 503, until what runs has
                      finished or --drain-timeout is over
    SIGUSR1           from the master, when it gets a SIGHUP: read models and keys again
    a failed engine   with --exit-on-failure: drain, then end with EXIT_ENGINE_FAILED

Knows the application object of serve/process/wsgi.py, nothing of Flask's views.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from serve.process.connections import BoundedWorker

EXIT_ENGINE_FAILED = 70
"""EX_SOFTWARE of sysexits.h: an internal error, which a supervisor may mend by starting the server again."""
FLUSH_S = 5.0
"""After an engine failed and the others have drained, for replies that say so to be written out."""
POLL_S = 0.02


class DrainingWorker(BoundedWorker):
    """Keeps accepting while it drains, and reloads beside the requests that run."""

    def init_signals(self) -> None:
        super().init_signals()
        self._is_draining = False
        # A terminal sends SIGINT and SIGHUP to the whole process group, not only to the master; what a SIGHUP
        # means, the master says.
        signal.signal(signal.SIGINT, self.handle_exit)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, self.handle_reload)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.booted:
            sys.exit(0)
        if self._is_draining:
            return
        self._is_draining = True
        # A request may have come so far as the kernel: then the poller has something to say.
        if self.num_busy == 0 and not self.poller.select(0):
            self.app.say_goodbye(0)
            os._exit(0)  # nobody waits for a reply, and an orderly end of gigabytes takes a good part of a second
        if not self._start("drain", self._drain):
            super().handle_exit(signal.SIGTERM, None)

    def handle_reload(self, sig: int, frame: FrameType | None) -> None:
        if self.booted and not self._is_draining:
            self._start("reload", self.app.reload)

    def notify(self) -> None:
        """Called by gunicorn's loop at least once a second."""
        super().notify()
        if not self._is_draining and self.app.must_exit():
            self._is_draining = self._start("failed", self._exit_failed)

    def set_accept_enabled(self, enabled: bool) -> None:
        if not enabled and self._accepting and not self.alive:
            # The kernel has accepted these already: they are told 503 rather than cut off.
            for listener in self.sockets:
                while self.nr_conns < self.worker_connections and self.accept(listener):
                    pass
        super().set_accept_enabled(enabled)

    def _cap_keepalive(self, deadline: float) -> None:
        """Idle connections end by the deadline, those too that never sent a byte: gunicorn would wait for them."""
        super()._cap_keepalive(deadline)
        for connection in self.pending_conns:
            connection.timeout = min(connection.timeout, deadline)

    def _start(self, name: str, work: Callable[[], object]) -> bool:
        """Start a thread; False, and a line in the log, if the system has none: the loop that calls this goes on."""
        try:
            threading.Thread(target=work, name=name, daemon=True).start()
        except RuntimeError as error:
            self.log.error("no thread to %s: %s", name, error)
            return False
        return True

    def _drain(self) -> None:
        try:
            self.app.drain()
        finally:
            super().handle_exit(signal.SIGTERM, None)

    def _exit_failed(self) -> None:
        """End the process once everybody has been told. Not in order: what failed may not let itself be closed."""
        try:
            self.log.error("an engine failed: the server ends with exit code %d", EXIT_ENGINE_FAILED)
            self.app.drain()
            deadline_s = time.monotonic() + FLUSH_S
            while self.num_busy > 0 and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
            self.app.say_goodbye(EXIT_ENGINE_FAILED)
        finally:
            os._exit(EXIT_ENGINE_FAILED)
