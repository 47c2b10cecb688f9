"""The process around the application: gunicorn, one worker, a thread per request in progress.

    master    holds the listening socket, passes signals on, ends with the worker
    worker    loads the model after the fork (ONNX Runtime's threads would not survive one), owns the engine's
              thread, answers requests from a pool of threads

SIGTERM, SIGINT and SIGHUP drain: the worker goes on answering, so that /readyz and new requests get a 503,
until what runs has finished or --drain-timeout is over; then the server exits with 0. A second SIGINT does
not wait.

Why gunicorn (MIT): it writes each chunk as it comes, its WSGI environment carries the client's socket, so
that a client who went away is noticed while nothing is written, and a master notices when the worker dies.
waitress (ZPL) also tells of lost clients, but collects output in a buffer of megabytes, so that a slow reader
never slows generation; cheroot (BSD) streams, but hides the socket, and has no master.
Knows nothing of Flask's views.
"""

import contextlib
import errno
import logging
import math
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from flask import Flask
from gunicorn import sock
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker
from werkzeug.wsgi import ClosingIterator

from runtime.errors import HeadraceError, InvalidSetting
from runtime.text_model import TextModel
from serve.app import create_app
from serve.metrics import ServerMetrics
from serve.settings import ServerSettings

SPARE_THREADS = 16
"""Beyond one per request the engine takes: for health checks, metrics and the 429 of a full queue."""
KEEPALIVE_S = 75
"""Longer than HTTP clients keep an idle connection (httpx: 5 s): the server must not close one that a request
is just being written to."""
STOP_MARGIN_S = 10
"""After the drain, for replies to be written out and the engine to end, before the worker is killed."""
STOP_POLL_S = 0.002
QUICK_STOP_S = 2.0
EXIT_USER_ERROR = 2

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

OpenModel = Callable[[ServerMetrics], TextModel]


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket, and the URL that reaches it from this machine."""

    socket: socket.socket
    url: str


def listen(host: str, port: int) -> Listener:
    """Bind before anything slow happens. Raises InvalidSetting if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InvalidSetting(f"--host {host!r} is not an address of this machine: {error}") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        hint = "; choose another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else ""
        raise InvalidSetting(f"cannot listen on {host} port {port}: {error.strerror}{hint}") from error
    bound_host, bound_port = bound.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound_host, bound_host)  # noqa: S104 - compared, not bound
    return Listener(bound, f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{bound_port}")


def run_server(
    open_model: OpenModel,
    listener: Listener,
    settings: ServerSettings,
    *,
    num_requests: int,
    on_ready: Callable[[TextModel], None],
) -> int:
    """Serve until a signal ends it; return the exit code.

    `open_model` runs in the worker and returns a model that is not started; what it raises ends the server.
    `num_requests` is how many the engine takes at once, running and waiting. `on_ready` is called in the
    worker when the model is loaded; connections made before wait in the listen queue.
    """
    application = HeadraceApplication(open_model, listener, settings, num_requests, on_ready)
    code = 0
    try:
        HeadraceArbiter(application).run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return code


class HeadraceApplication(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's configuration, and in the worker the model."""

    def __init__(
        self,
        open_model: OpenModel,
        listener: Listener,
        settings: ServerSettings,
        num_requests: int,
        on_ready: Callable[[TextModel], None],
    ) -> None:
        self._open_model = open_model
        self._listener = listener
        self._settings = settings
        self._num_threads = num_requests + SPARE_THREADS
        self._on_ready = on_ready
        self._goodbye = os.pipe()
        self.model: TextModel | None = None
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        values = {
            "bind": f"fd://{self._listener.socket.detach()}",
            "worker_class": DrainingWorker,
            "workers": 1,
            "threads": self._num_threads,
            "worker_connections": self._num_threads + 1000,
            "keepalive": KEEPALIVE_S,
            # No heartbeat: loading a model blocks the worker's main thread for as long as it takes.
            "timeout": 0,
            "graceful_timeout": math.ceil(settings.drain_timeout) + STOP_MARGIN_S,
            "control_socket_disable": True,
            "accesslog": "-" if settings.access_log else None,
            "loglevel": "warning",
            "proc_name": "headrace",
            "post_worker_init": lambda _worker: self._on_ready(self._loaded()),
            "worker_exit": lambda _arbiter, _worker: self.close(),
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called by the worker once it runs. A model that cannot be loaded ends the whole server."""
        metrics = ServerMetrics()
        try:
            self.model = self._open_model(metrics)
        except HeadraceError as error:
            sys.stderr.write(f"headrace serve: {error}\n")
            sys.stderr.flush()
            sys.exit(Arbiter.APP_LOAD_ERROR)
        self.model.start()
        app = create_app(self.model, self._settings, metrics)
        app.wsgi_app = self._in_flight = InFlight(app.wsgi_app)  # type: ignore[method-assign]  # Flask's own seam
        return app

    def say_goodbye(self) -> None:
        """In the worker: tell the master that nothing is left to wait for but the kernel freeing our memory."""
        os.write(self._goodbye[1], b".")

    def worker_said_goodbye(self, timeout_s: float) -> bool:
        """In the master: whether the worker ended with nothing to finish; waits at most `timeout_s` for the word."""
        return bool(select.select([self._goodbye[0]], [], [], timeout_s)[0])

    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self._in_flight.num_requests == 0

    def drain(self) -> None:
        """Refuse new requests and wait for those that run, at most --drain-timeout seconds."""
        if not self._loaded().drain(self._settings.drain_timeout):
            sys.stderr.write(f"headrace serve: gave up on requests after {self._settings.drain_timeout:g} s\n")

    def close(self) -> None:
        """End the engine's thread and release the model, if there is one."""
        if self.model is not None:
            self.model.close()

    def _loaded(self) -> TextModel:
        assert self.model is not None
        return self.model


class InFlight:
    """WSGI middleware that counts the requests between their arrival and the last byte of their reply."""

    def __init__(self, app: "WSGIApplication") -> None:
        self._app = app
        self._lock = threading.Lock()
        self.num_requests = 0

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        self._count(1)
        try:
            return ClosingIterator(self._app(environ, start_response), lambda: self._count(-1))
        except BaseException:
            self._count(-1)
            raise

    def _count(self, change: int) -> None:
        with self._lock:
            self.num_requests += change


class DrainingWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's threaded worker, which keeps accepting while it drains."""

    def init_signals(self) -> None:
        super().init_signals()
        self._is_draining = False
        # A terminal sends these to the whole process group, not only to the master.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.handle_exit)

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

    def _drain(self) -> None:
        try:
            self.app.drain()
        finally:
            super().handle_exit(signal.SIGTERM, None)


class HeadraceArbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's master for exactly one worker: no reload, no scaling, and exit codes of this project."""

    handle_int = Arbiter.handle_term
    handle_hup = Arbiter.handle_term

    def setup(self, app: BaseApplication) -> None:
        super().setup(app)
        self.log.error_log.addFilter(_is_news)

    def stop(self, graceful: bool = True) -> None:
        """End the worker and wait for it; gunicorn's own looks only every 100 ms. A second SIGINT does not wait."""
        sock.close_sockets(self.LISTENERS, unlink=False)
        self.LISTENERS.clear()
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        deadline = time.monotonic() + self.cfg.graceful_timeout
        while self.WORKERS and time.monotonic() < deadline:
            if self.app.worker_said_goodbye(STOP_POLL_S):
                os._exit(0)
            with contextlib.suppress(queue.Empty):
                if self.SIG_QUEUE.get_nowait() in (signal.SIGINT, signal.SIGQUIT):
                    self.kill_workers(signal.SIGQUIT)
                    deadline = min(deadline, time.monotonic() + QUICK_STOP_S)
            self.reap_workers()
        self.kill_workers(signal.SIGKILL)
        self.reap_workers()

    def _ignore(self) -> None:
        """Signals that would change the number of workers or replace the master."""

    handle_ttin = handle_ttou = handle_usr2 = handle_winch = _ignore

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        if exit_status != self.APP_LOAD_ERROR:
            super().halt(reason, exit_status)
        self.stop()
        sys.exit(EXIT_USER_ERROR)


def _is_news(record: logging.LogRecord) -> bool:
    """Drops gunicorn's note of a worker that could not load: the worker has said why, in one line."""
    return not (isinstance(record.args, tuple) and record.args[1:] == (Arbiter.APP_LOAD_ERROR,))
