"""Client connections that cannot hold the server up: every wait on a socket is bounded.

What a connection in each state costs, and for how long at most:

    idle, or no byte sent yet              no thread; KEEPALIVE_S, less if a new connection needs its place
    sending a request                      a thread; --read-timeout for the whole request, however slowly bytes come
    receiving a reply                      a thread; --write-timeout without accepting a byte, and SEND_BUFFER bytes
    answered, not yet closed by the client a thread; LINGER_S

A client that exceeds a timeout counts as gone, and its requests are cancelled. If the system has no thread or no file
descriptor for one more connection, that connection alone is closed. Uses the internals of gunicorn's threaded worker:
its own queues have no such bounds. Knows nothing of Flask or models.
"""

import contextlib
import errno
import socket
import time
from concurrent.futures import Future
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

from serve.process.refusals import refusal_of

SEND_BUFFER = 256 * 1024
"""Bytes the kernel may hold for a slow reader. The kernel's default grows to megabytes."""
PIECE = 128 * 1024
"""Bytes of a reply that are written under one timeout, so that a large reply to a slow client does not count as a
stall."""
LINGER_S = 2.0
"""How long we wait for the client to close, after our last byte; RFC 9112 section 9.6."""
FULL_PAUSE_S = 0.05
"""Pause after a failed accept if there is no idle connection to close. Without it the loop would spin."""
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)
"""Errors of the listening socket itself. Every other error concerns one connection, which is gone (accept(2))."""
WARN_EVERY_S = 60.0
"""Least time between two warnings: a shortage affects every connection while it lasts."""


class BoundedSocket(socket.socket):
    """A blocking socket whose reads share a deadline and whose writes may not stall.

    The deadline starts at `setblocking`, which gunicorn calls when a thread starts to read a request.
    """

    def __init__(self, accepted: socket.socket, *, read_s: float, write_s: float) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._read_s = read_s
        self._write_s = write_s
        self._deadline = 0.0

    def setblocking(self, flag: bool) -> None:
        self.limit_reads(self._read_s)
        super().setblocking(flag)

    def limit_reads(self, seconds: float) -> None:
        """Set the deadline of all following reads."""
        self._deadline = time.monotonic() + seconds

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        self._wait_at_most(self._deadline - time.monotonic())
        try:
            return super().recv(bufsize, flags)
        except TimeoutError:
            raise _gone("the request did not arrive in time") from None

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            self._wait_at_most(self._write_s)
            try:
                super().sendall(view[start : start + PIECE], flags)
            except TimeoutError:
                raise _gone("the client did not read its reply") from None

    def _wait_at_most(self, seconds: float) -> None:
        # Never 0: that would make the socket non-blocking, which raises another error.
        self.settimeout(max(0.001, seconds))


def _gone(reason: str) -> ConnectionResetError:
    """A lost connection, as gunicorn and werkzeug expect it: they log nothing."""
    return ConnectionResetError(errno.ECONNRESET, reason)


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A connection that closes at once. gunicorn's lingers, in the only thread that accepts connections."""

    def close(self, graceful: bool = False) -> None:
        util.close(self.sock)


class BoundedWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's threaded worker with bounded connections. Idle and new connections wait without a thread.

    There may be a thread for every connection, started when needed: with a smaller pool, as many stalled clients as
    the pool has threads would keep all other clients out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_keepalived = self.worker_connections
        self._next_warning_s = 0.0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Replaces gunicorn's check, which warns if there are as many threads as connections, as here."""

    @property
    def num_busy(self) -> int:
        """Connections on which a request is arriving, running, or has just been answered."""
        return int(self.nr_conns - len(self.pending_conns) - len(self.keepalived_conns))

    def accept(self, listener: socket.socket) -> None:
        """Accept a waiting connection. An error of one connection never ends the worker."""
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno in BROKEN:
                raise
            if error.errno in FULL:
                self._warn("no file is free for one more connection (%s): see ulimit -n", error.strerror)
                if not self._close_idle():
                    time.sleep(FULL_PAUSE_S)
            return
        try:
            self._watch(accepted, address, listener)
        except OSError as error:
            self._warn("a connection could not be taken: %s", error.strerror)
            accepted.close()

    def _watch(self, accepted: socket.socket, address: Any, listener: socket.socket) -> None:
        """Wait for the first byte of a new connection, without a thread."""
        settings = self.app.settings
        client = BoundedSocket(accepted, read_s=settings.read_timeout, write_s=settings.write_timeout)
        try:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if self.nr_conns >= self.worker_connections - 1:
                # At the limit. gunicorn stops accepting if no connection can be closed.
                self._close_idle()
            connection = Connection(self.cfg, client, address, listener.getsockname())
            connection.set_timeout()
            self.poller.register(client, EVENT_READ, partial(self.on_pending_socket_readable, connection))
        except OSError:
            client.close()
            raise
        self.nr_conns += 1
        self.pending_conns.append(connection)

    def _close_idle(self) -> bool:
        """Close the connection that has been idle longest. Returns False if none is idle."""
        waiting = [queue for queue in (self.pending_conns, self.keepalived_conns) if queue]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda queue: queue[0].timeout).popleft()
        self.poller.unregister(oldest.sock)
        self.nr_conns -= 1
        oldest.close()
        return True

    def on_pending_socket_readable(self, conn: Connection, client: socket.socket) -> None:
        if client.fileno() >= 0:  # else it was closed to make room, in the same turn of the loop
            super().on_pending_socket_readable(conn, client)

    def on_client_socket_readable(self, conn: Connection, client: socket.socket) -> None:
        if client.fileno() >= 0:
            super().on_client_socket_readable(conn, client)

    def enqueue_req(self, conn: Connection) -> None:
        """Let a thread handle the connection. If the system cannot start a thread, close the connection.

        The pool queues the work even if it then fails to start a thread. So the work is cancelled here, unless another
        thread of the pool has already begun it.
        """
        done: Future[Any] = Future()
        done.add_done_callback(lambda result: self.method_queue.defer(self.finish_request, conn, result))

        def work() -> None:
            if done.set_running_or_notify_cancel():
                done.set_result(self.handle(conn))

        try:
            self.tpool.submit(work)
        except (RuntimeError, MemoryError) as error:
            if done.cancel():
                self._warn("no thread for one more connection (%s): closing it; see pids.max, ulimit -u", error)

    def handle(self, conn: Connection) -> Any:
        """Answer requests as gunicorn does, in the connection's own thread. Never raises."""
        try:
            is_kept = super().handle(conn)
            if not is_kept:
                # Returns at once if the client is gone.
                conn.sock.limit_reads(LINGER_S)
                util.close_graceful(conn.sock, timeout=LINGER_S)
        except BaseException as error:  # a SystemExit or a panic in Rust code would end the worker
            self.log.error("a connection from %s failed", conn.client[0], exc_info=error)
            return False
        return is_kept

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer a malformed request with a JSON error; gunicorn would send a page of HTML."""
        refusal = refusal_of(exc)
        if refusal.is_ours:
            self.log.error("a request from %s failed", addr[0], exc_info=exc)
        else:
            self.log.warning("refused a request from %s: %s", addr[0], refusal.message)
        with contextlib.suppress(OSError):
            client.sendall(refusal.to_bytes())

    def _warn(self, message: str, *values: Any) -> None:
        if time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + WARN_EVERY_S
            self.log.warning(message, *values)
