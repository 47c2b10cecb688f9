"""The process around the application: gunicorn, one worker, a thread per request in progress.

    master    holds the listening socket, passes signals on, ends with the worker
    worker    loads the models after the fork (ONNX Runtime's threads would not survive one), owns the engines'
              threads, answers requests from a pool of threads; serve/worker.py, serve/connections.py

SIGTERM and SIGINT drain, then the server exits with 0; a second SIGINT does not wait. SIGHUP reads models and keys
again, unless it came because the terminal is gone: then it drains.

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
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flask import Flask
from gunicorn import sock
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from werkzeug.wsgi import ClosingIterator

from runtime.errors import HeadraceError, InvalidSetting
from serve.access import Access
from serve.api_keys import KeyRing, read_keys, reread_keys
from serve.app import create_app
from serve.logs import configure_logging
from serve.model_registry import ModelRegistry, ModelSource
from serve.settings import ServerSettings
from serve.traces import Traces, endpoint_of
from serve.worker import DrainingWorker

KEEPALIVE_S = 75
"""Longer than HTTP clients keep an idle connection (httpx: 5 s): the server must not close one that a request
is just being written to."""
STOP_MARGIN_S = 10
"""After the drain, for replies to be written out and the engine to end, before the worker is killed."""
SPARE_FILES = 256
"""Open files beyond the connections: the models' own, pipes, logs."""
MAX_REQUEST_LINE = 4094
MAX_HEADERS = 64
MAX_HEADER = 8190
"""Bytes of a header; with MAX_HEADERS, what a client can make the server keep before a body is allowed or refused."""
STOP_POLL_S = 0.002
QUICK_STOP_S = 2.0
EXIT_USER_ERROR = 2

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


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
    sources: Mapping[str, ModelSource],
    listener: Listener,
    settings: ServerSettings,
    *,
    on_ready: Callable[[ModelRegistry], None],
) -> int:
    """Serve until a signal ends it; return the exit code.

    `sources` opens each model by its name, in the worker; what that raises at the start ends the server.
    `on_ready` is called in the worker when all are loaded. Health checks are answered before.
    """
    access = Access(_read_key_ring(settings))
    endpoint_of(settings.otlp_endpoint)
    _allow_open_files(settings.max_connections)
    application = HeadraceApplication(sources, listener, settings, access, on_ready)
    code = 0
    try:
        HeadraceArbiter(application).run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return code


def _read_key_ring(settings: ServerSettings) -> KeyRing | None:
    return None if settings.api_keys is None else KeyRing(read_keys(Path(settings.api_keys)))


def _allow_open_files(num_connections: int) -> None:
    """Raise this process's limit of open files as far as it may. InvalidSetting if that is not enough."""
    needed = num_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InvalidSetting(
                f"{num_connections} connections need {needed} open files, the limit here is {hard} (ulimit -Hn); "
                f"set --max-connections {max(16, hard - SPARE_FILES)} or less"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class HeadraceApplication(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's configuration, and in the worker the models."""

    def __init__(
        self,
        sources: Mapping[str, ModelSource],
        listener: Listener,
        settings: ServerSettings,
        access: Access,
        on_ready: Callable[[ModelRegistry], None],
    ) -> None:
        self.settings = settings
        self._listener = listener
        self._access = access
        self._on_ready = on_ready
        self._goodbye = os.pipe()
        self._models = ModelRegistry(sources, aliases=settings.alias, takes_any_name=settings.any_model_name)
        self._traces: Traces | None = None
        super().__init__()

    def load_config(self) -> None:
        settings = self.settings
        values = {
            "bind": f"fd://{self._listener.socket.detach()}",
            "worker_class": DrainingWorker,
            "workers": 1,
            "threads": settings.max_connections,
            "worker_connections": settings.max_connections,
            "keepalive": KEEPALIVE_S,
            "limit_request_line": MAX_REQUEST_LINE,
            "limit_request_fields": MAX_HEADERS,
            "limit_request_field_size": MAX_HEADER,
            # No heartbeat: a worker that is busy is not dead, and one that is dead the master sees.
            "timeout": 0,
            "graceful_timeout": math.ceil(settings.drain_timeout) + STOP_MARGIN_S,
            "control_socket_disable": True,
            "loglevel": "warning",
            "proc_name": "headrace",
            "worker_exit": lambda _arbiter, _worker: self._models.close(),
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called by the worker once it runs. Requests are answered from now on, with 503 until the models are there."""
        configure_logging(self.settings.log_format)
        threading.Thread(target=self._load_models, name="load", daemon=True).start()
        if (endpoint := endpoint_of(self.settings.otlp_endpoint)) is not None:
            self._traces = Traces(endpoint)
        app = create_app(self._models, self.settings, access=self._access, traces=self._traces)
        app.wsgi_app = self._in_flight = InFlight(app.wsgi_app)  # type: ignore[method-assign]  # Flask's own seam
        return app

    def _load_models(self) -> None:
        """A model that cannot be loaded at the start ends the whole server, with one line if the user can mend it."""
        try:
            self._models.load()
        except HeadraceError as error:
            sys.stderr.write(f"headrace serve: {error}\n")
            sys.stderr.flush()
            os._exit(Arbiter.APP_LOAD_ERROR)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(Arbiter.WORKER_BOOT_ERROR)
        self._on_ready(self._models)

    def reload(self) -> None:
        """Read keys and models again. A model that cannot be read stays as it was; a key that cannot be read is out."""
        if self.settings.api_keys is not None:
            keys, problems = reread_keys(Path(self.settings.api_keys))
            for problem in problems:
                log.error("reload: %s", problem)
            log.warning("reload: %d keys are let in", len(keys))
            self._access.replace_keys(KeyRing(keys))
        self._models.reload()

    def say_goodbye(self) -> None:
        """In the worker: tell the master that nothing is left to wait for but the kernel freeing our memory."""
        self.send_traces()
        os.write(self._goodbye[1], b".")

    def worker_said_goodbye(self, timeout_s: float) -> bool:
        """In the master: whether the worker ended with nothing to finish; waits at most `timeout_s` for the word."""
        return bool(select.select([self._goodbye[0]], [], [], timeout_s)[0])

    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self._in_flight.num_requests == 0

    def drain(self) -> None:
        """Refuse new requests and wait for those that run, at most --drain-timeout seconds."""
        if not self._models.drain(self.settings.drain_timeout):
            sys.stderr.write(f"headrace serve: gave up on requests after {self.settings.drain_timeout:g} s\n")
        self.send_traces()

    def send_traces(self) -> None:
        """Send the spans that wait for their batch, if there are any."""
        if self._traces is not None:
            self._traces.close()


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


class HeadraceArbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's master for exactly one worker: no scaling, and exit codes of this project."""

    handle_int = Arbiter.handle_term

    def setup(self, app: BaseApplication) -> None:
        super().setup(app)
        self.log.error_log.addFilter(_is_news)
        self._had_terminal = os.isatty(sys.stdin.fileno()) if sys.stdin is not None else False

    def handle_hup(self) -> None:
        """Reload; but a terminal that was closed sends this signal too, and takes its server along."""
        if self._had_terminal and not os.isatty(sys.stdin.fileno()):
            self.handle_term()
        else:
            self.kill_workers(signal.SIGUSR1)

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
