"""The process around the application: gunicorn, one worker, a thread per request in progress.

    master    holds the listening socket, passes signals on, ends with the worker
    worker    loads the models after the fork (ONNX Runtime's threads would not survive one), owns the engines'
              threads, answers requests from a pool of threads; serve/process/worker.py, serve/process/connections.py

SIGTERM and SIGINT drain, then the server exits with 0; a second SIGINT does not wait. SIGHUP reads models and keys
again, unless it came because the terminal is gone: then it drains. With --exit-on-failure the server ends with 70 when
an engine failed; without, it stays and says so, for an orchestrator that asks /healthz.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flask import Flask
from gunicorn import sock
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from runtime.errors import HeadraceError, InvalidSetting
from serve.access.api_keys import KeyRing, read_keys, reread_keys
from serve.access.middleware import Access
from serve.app import create_app
from serve.hosts import ANY
from serve.model_registry import ModelRegistry, ModelSource
from serve.observe.logs import configure_logging, make_formatter
from serve.observe.traces import Traces, endpoint_of
from serve.process.refusals import MAX_HEADER, MAX_HEADERS, MAX_REQUEST_LINE
from serve.process.thread_limits import threads_for
from serve.process.worker import EXIT_ENGINE_FAILED, DrainingWorker
from serve.settings import ServerSettings

KEEPALIVE_S = 75
"""Longer than HTTP clients keep an idle connection (httpx: 5 s): the server must not close one that a request
is just being written to."""
STOP_MARGIN_S = 10
"""After the drain, for replies to be written out and the engine to end, before the worker is killed."""
SPARE_FILES = 256
"""Open files beyond the connections: the models' own, pipes, logs."""
STOP_POLL_S = 0.002
QUICK_STOP_S = 2.0
EXIT_USER_ERROR = 2
SAID_EXITS = (Arbiter.APP_LOAD_ERROR, EXIT_ENGINE_FAILED)
"""Exit codes of a worker that has said why it ends."""

log = logging.getLogger(__name__)


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
    configure_logging(settings.log_format)
    if ANY in settings.cors_origin and access.keys is None:
        log.warning(
            "--cors-origin * without --api-keys: whatever page is open in a browser that reaches this server can use it"
        )
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
            "threads": threads_for(settings.max_connections),
            "worker_connections": settings.max_connections,
            "keepalive": KEEPALIVE_S,
            "limit_request_line": MAX_REQUEST_LINE,
            "limit_request_fields": MAX_HEADERS,
            "limit_request_field_size": MAX_HEADER,
            # No heartbeat: a worker that is busy is not dead, and one that is dead the master sees.
            "timeout": 0,
            "graceful_timeout": math.ceil(settings.drain_timeout) + STOP_MARGIN_S,
            # A proxy on this machine is a client like any other: gunicorn would let loopback peers rewrite the path.
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "secure_scheme_headers": {},
            "control_socket_disable": True,
            "loglevel": "warning",
            "proc_name": "headrace",
            "child_exit": _end_with_failed_worker,
            "worker_exit": lambda _arbiter, _worker: self._models.close(),
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called by the worker once it runs. Requests are answered from now on, with 503 until the models are there."""
        threading.Thread(target=self._load_models, name="load", daemon=True).start()
        if (endpoint := endpoint_of(self.settings.otlp_endpoint)) is not None:
            self._traces = Traces(endpoint)
        return create_app(self._models, self.settings, access=self._access, traces=self._traces)

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

    def say_goodbye(self, code: int) -> None:
        """In the worker: tell the master the exit code, and that there is nothing to wait for but the kernel freeing
        our memory."""
        try:
            self.send_traces()
        finally:
            os.write(self._goodbye[1], bytes([code]))

    def goodbye_code(self, timeout_s: float) -> int | None:
        """In the master: the exit code of a worker that said goodbye; waits at most `timeout_s` for the word."""
        if not select.select([self._goodbye[0]], [], [], timeout_s)[0]:
            return None
        return os.read(self._goodbye[0], 1)[0]

    def must_exit(self) -> bool:
        """Whether an engine has failed and the server is to end then."""
        return self.settings.exit_on_failure and bool(self._models.failures())

    def drain(self) -> None:
        """Refuse new requests and wait for those that run, at most --drain-timeout seconds."""
        if not self._models.drain(self.settings.drain_timeout):
            log.warning("gave up on requests after %g s", self.settings.drain_timeout)
        self.send_traces()

    def send_traces(self) -> None:
        """Send the spans that wait for their batch, if there are any."""
        if self._traces is not None:
            self._traces.close()


class HeadraceArbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's master for exactly one worker: no scaling, and exit codes of this project."""

    handle_int = Arbiter.handle_term

    def setup(self, app: BaseApplication) -> None:
        super().setup(app)
        self.log.error_log.addFilter(_is_news)
        for handler in self.log.error_log.handlers:
            handler.setFormatter(make_formatter(app.settings.log_format))
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
            if (code := self.app.goodbye_code(STOP_POLL_S)) is not None:
                os._exit(code)
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
        """End the server. Where the worker has said why, in one line, nothing is added."""
        if exit_status not in SAID_EXITS:
            super().halt(reason, exit_status)
        self.stop()
        sys.exit(EXIT_USER_ERROR if exit_status == self.APP_LOAD_ERROR else exit_status)


def _end_with_failed_worker(arbiter: HeadraceArbiter, _worker: DrainingWorker) -> None:
    """gunicorn would start another worker; with --exit-on-failure that is the supervisor's business."""
    if arbiter.app.goodbye_code(0) == EXIT_ENGINE_FAILED:
        raise HaltServer("an engine failed", EXIT_ENGINE_FAILED)


def _is_news(record: logging.LogRecord) -> bool:
    """Drops gunicorn's note of a worker that has said itself why it ends."""
    return not (isinstance(record.args, tuple) and record.args[1:] and record.args[1] in SAID_EXITS)
