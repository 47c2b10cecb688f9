"""The worker process: answers requests, drains, reloads, and ends itself when an engine has failed.

    SIGTERM, SIGINT   drain: keep answering (new requests and /readyz get a 503) until the running requests have
                      finished or --drain-timeout is over, then exit
    SIGQUIT           exit at once
    SIGUSR1           read models and keys again; the master sends it when it gets a SIGHUP
    a failed engine   with --exit-on-failure: drain, then exit with EXIT_INTERNAL
    a dead master     drain, then exit

Uses the application object of serve/process/wsgi.py. Knows nothing of Flask's views.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from serve.process.connections import BoundedWorker

EXIT_INTERNAL = 70
"""EX_SOFTWARE of sysexits.h: an internal error. A supervisor may start the server again."""
FLUSH_S = 8.0
"""Time for the last replies to be written out after the drain. Shorter than STOP_MARGIN_S of the master."""
POLL_S = 0.02


class DrainingWorker(BoundedWorker):
    """Keeps accepting connections while it drains. Reloads while requests run."""

    def init_signals(self) -> None:
        super().init_signals()
        self._is_draining = False
        # A terminal sends SIGINT and SIGHUP to every process of the group. The master decides what a SIGHUP means.
        signal.signal(signal.SIGINT, self.handle_exit)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, self.handle_reload)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.booted:
            sys.exit(0)
        if not self._is_draining:
            self._is_draining = True
            self._exit_if_quiet(0)
            if not self._start("drain", self._drain, 0):
                super().handle_exit(signal.SIGTERM, None)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        os._exit(0)

    def handle_reload(self, sig: int, frame: FrameType | None) -> None:
        if self.booted and not self._is_draining:
            self._start("reload", self.app.reload)

    def notify(self) -> None:
        """Called by gunicorn's loop at least once a second."""
        super().notify()
        if not self._is_draining and self.app.must_exit():
            self.log.error("an engine failed: the server ends with exit code %d", EXIT_INTERNAL)
            self._is_draining = self._start("drain", self._drain, EXIT_INTERNAL)

    def is_parent_alive(self) -> bool:
        """Start to drain if the master is dead. True in any case: the drain ends the process, not gunicorn's loop."""
        if not super().is_parent_alive():
            self.handle_exit(signal.SIGTERM, None)
        return True

    def _start(self, name: str, work: Callable[..., object], *args: object) -> bool:
        """Start a thread. If the system has no thread left, log that and return False, so that the loop goes on."""
        try:
            threading.Thread(target=work, args=args, name=name, daemon=True).start()
        except RuntimeError as error:
            self.log.error("no thread to %s: %s", name, error)
            return False
        return True

    def _drain(self, code: int) -> None:
        """Wait for the running requests and for their replies to be written out, then end the process."""
        try:
            self.app.drain()
            deadline_s = time.monotonic() + FLUSH_S
            while time.monotonic() < deadline_s:
                self.method_queue.defer(self._exit_if_quiet, code)
                time.sleep(POLL_S)
        finally:
            self._exit(code)

    def _exit_if_quiet(self, code: int) -> None:
        """In the main thread: end the process unless a request is running, or waits in the kernel."""
        if self.num_busy == 0 and not self.poller.select(0):
            self._exit(code)

    def _exit(self, code: int) -> None:
        """Without Python's own cleanup: freeing gigabytes takes about 150 ms, and a failed engine may not close."""
        try:
            self.app.send_traces()
            if code == 0:
                for listener in self.sockets:
                    listener.close()
                os.ftruncate(self.tmp.fileno(), 1)  # the sign that `has_finished` looks for
        finally:
            os._exit(code)


def has_finished(worker: DrainingWorker) -> bool:
    """In the master: whether the worker has nothing left to do. The system may still be freeing its memory."""
    return os.fstat(worker.tmp.fileno()).st_size > 0
