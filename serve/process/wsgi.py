"""The server's processes: gunicorn with a master, one worker, and a thread for each request in progress.

    master    holds the listening socket, passes signals on, ends with the worker
    worker    loads the models after the fork (ONNX Runtime's threads do not survive one), runs the engines' threads and
              answers requests from a thread pool; see serve/process/worker.py and serve/process/connections.py

SIGTERM and SIGINT drain; then the server exits with 0. A second SIGINT does not wait. SIGHUP reads models and keys
again, unless it was sent because the terminal closed: then the server drains. With --exit-on-failure the server exits
with 70 when an engine has failed. Without it, the server stays up and /healthz reports the failure.

Why gunicorn (MIT): it writes each chunk at once; its WSGI environment has the client's socket, so that we notice a lost
client even while nothing is written; its master notices a dead worker. waitress (ZPL) reports lost clients too, but
buffers megabytes of output, so a slow reader never slows generation down. cheroot (BSD) streams, but hides the socket
and has no master. We subclass gunicorn's internals, which setup.cfg therefore pins to one major version: its threaded
worker ties a thread to every new connection, and its sockets wait without limit for slow clients.

Knows nothing of Flask's views.
"""

import errno
import logging
import math
import os
import resource
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
from serve.process.worker import EXIT_INTERNAL, DrainingWorker, has_finished
from serve.settings import ServerSettings

KEEPALIVE_S = 75
"""Longer than HTTP clients keep an idle connection (httpx: 5 s), so that no connection is closed while a client sends a
request on it."""
STOP_MARGIN_S = 10
"""Time after --drain-timeout before the master kills the worker. Longer than FLUSH_S of the worker."""
QUICK_STOP_S = 0.1
"""Time that an idle worker gets to end before gunicorn's own wait begins, which looks only every 100 ms."""
STOP_POLL_S = 0.001
SPARE_FILES = 256
"""Open files beside the connections: the models' files, pipes, logs."""
EXIT_USER_ERROR = 2
REPORTED_EXITS = (Arbiter.APP_LOAD_ERROR, EXIT_INTERNAL)
"""Exit codes of a worker that has already said why it ends."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket, and the URL that reaches it from this machine."""

    socket: socket.socket
    url: str


def listen(host: str, port: int) -> Listener:
    """Bind the address, before anything slow happens. Raises InvalidSetting if that fails."""
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
    """Serve until a signal ends the server; return the exit code.

    `sources` says how to open each model, by name. The worker opens them; an error at the start ends the server.
    `on_ready` is called in the worker when all models are loaded. Health checks are answered before that.
    """
    access = Access(None if settings.api_keys is None else KeyRing(read_keys(Path(settings.api_keys))))
    endpoint_of(settings.otlp_endpoint)
    _allow_open_files(settings.max_connections)
    configure_logging(settings.log_format)
    if ANY in settings.cors_origin and access.keys is None:
        log.warning("--cors-origin * without --api-keys: any web page in a browser that reaches this server can use it")
    application = HeadraceApplication(sources, listener, settings, access, on_ready)
    try:
        HeadraceArbiter(application).run()
    except SystemExit as end:  # what gunicorn itself failed at; a server that has run ends in `halt`
        return end.code if isinstance(end.code, int) else 1
    return 0


def _allow_open_files(num_connections: int) -> None:
    """Raise this process's limit of open files. Raises InvalidSetting if the system's hard limit is too low."""
    needed = num_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InvalidSetting(
                f"{num_connections} connections need {needed} open files and the limit here is {hard} (ulimit -Hn); "
                f"set --max-connections {max(16, hard - SPARE_FILES)} or less"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class HeadraceApplication(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's configuration, and the models in the worker."""

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
            # No heartbeat: a busy worker is not dead, and the master notices a dead one.
            "timeout": 0,
            "graceful_timeout": math.ceil(settings.drain_timeout) + STOP_MARGIN_S,
            # By default gunicorn lets peers on loopback rewrite the path; here a local proxy is an ordinary client.
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "secure_scheme_headers": {},
            "control_socket_disable": True,
            "loglevel": "warning",
            "proc_name": "headrace",
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called in the worker. From now on requests are answered, with 503 until the models are loaded."""
        threading.Thread(target=self._load_models, name="load", daemon=True).start()
        if (endpoint := endpoint_of(self.settings.otlp_endpoint)) is not None:
            self._traces = Traces(endpoint)
        return create_app(self._models, self.settings, access=self._access, traces=self._traces)

    def _load_models(self) -> None:
        """Load the models. A failure ends the whole server, with a single line if it is one that the user can fix."""
        try:
            self._models.load()
        except HeadraceError as error:
            sys.stderr.write(f"headrace serve: {error}\n")
            sys.stderr.flush()
            os._exit(Arbiter.APP_LOAD_ERROR)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(EXIT_INTERNAL)
        self._on_ready(self._models)

    def reload(self) -> None:
        """Read keys and models again. A model that cannot be read stays as it was; a key that cannot be read is
        removed."""
        if self.settings.api_keys is not None:
            keys, problems = reread_keys(Path(self.settings.api_keys))
            for problem in problems:
                log.error("reload: %s", problem)
            log.warning("reload: %d API keys are valid", len(keys))
            self._access.replace_keys(KeyRing(keys))
        self._models.reload()

    def must_exit(self) -> bool:
        """Whether an engine has failed and --exit-on-failure is set."""
        return self.settings.exit_on_failure and bool(self._models.failures())

    def drain(self) -> None:
        """Refuse new requests and wait for the running ones, at most --drain-timeout seconds; then cancel them."""
        if not self._models.drain(self.settings.drain_timeout):
            log.warning("gave up on requests after %g s", self.settings.drain_timeout)

    def send_traces(self) -> None:
        """Send the spans that are not sent yet."""
        if self._traces is not None:
            self._traces.close()


class HeadraceArbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's master for exactly one worker: it does not scale, and has this project's exit codes."""

    WORKER_BOOT_ERROR = EXIT_INTERNAL
    """The server ends with this code if the worker does; after any other failure gunicorn starts a new worker."""
    handle_int = Arbiter.handle_term

    def setup(self, app: BaseApplication) -> None:
        super().setup(app)
        self.log.error_log.addFilter(_is_news)
        for handler in self.log.error_log.handlers:
            handler.setFormatter(make_formatter(app.settings.log_format))
        self._had_terminal = os.isatty(sys.stdin.fileno()) if sys.stdin is not None else False

    def handle_hup(self) -> None:
        """Reload. If the terminal was closed, which sends this signal too, stop instead."""
        if self._had_terminal and not os.isatty(sys.stdin.fileno()):
            self.handle_term()
        else:
            self.kill_workers(signal.SIGUSR1)

    def _ignore(self) -> None:
        """Signals that would change the number of workers or replace the master."""

    handle_ttin = handle_ttou = handle_usr2 = handle_winch = _ignore

    def stop(self, graceful: bool = True) -> None:
        """Stop the worker. An idle one finishes within QUICK_STOP_S; for any other gunicorn waits."""
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        deadline_s = time.monotonic() + QUICK_STOP_S
        while self.WORKERS and time.monotonic() < deadline_s:
            if all(has_finished(worker) for worker in self.WORKERS.values()):
                self.WORKERS.clear()  # nobody needs to wait while its memory is freed
            else:
                self.reap_workers()
                time.sleep(STOP_POLL_S)
        super().stop(graceful)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        """End the server. Logs nothing, unlike gunicorn's: the worker has already said why."""
        try:
            self.stop()
        except HaltServer as end:  # the worker failed while it was being stopped
            exit_status = end.exit_status
        # Without Python's cleanup of the imported modules, which takes half a second.
        os._exit(EXIT_USER_ERROR if exit_status == self.APP_LOAD_ERROR else exit_status)


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out gunicorn's line about the exit code of a worker that has already said why it ends."""
    return not (isinstance(record.args, tuple) and record.args[1:] and record.args[1] in REPORTED_EXITS)
