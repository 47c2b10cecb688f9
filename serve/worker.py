"""The worker process: loads the models, answers, drains and reloads when it is told to.

    SIGTERM, SIGINT   drain: go on answering, so that /readyz and new requests get a 503, until what runs has
                      finished or --drain-timeout is over
    SIGUSR1           from the master, when it gets a SIGHUP: read models and keys again

Knows the application object of serve/wsgi.py, nothing of Flask's views.
"""

import os
import signal
import sys
import threading
from types import FrameType

from serve.connections import BoundedWorker


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
        if self.app.is_idle():
            self.app.say_goodbye()
            os._exit(0)  # nobody waits for a reply, and an orderly end of gigabytes takes a good part of a second
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def handle_reload(self, sig: int, frame: FrameType | None) -> None:
        if self.booted and not self._is_draining:
            threading.Thread(target=self.app.reload, name="reload", daemon=True).start()

    def _drain(self) -> None:
        try:
            self.app.drain()
        finally:
            super().handle_exit(signal.SIGTERM, None)
