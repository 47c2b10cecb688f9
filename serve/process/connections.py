"""Client connections that cannot hold the server up: every wait on a socket has an end.

What each kind of connection costs, and for how long at most:

    idle, or not a byte sent yet      no thread; KEEPALIVE_S, less if its place is needed for a new one
    sending a request                 a thread; --read-timeout for all of it, so that drops of bytes do not help
    being answered                    a thread; --write-timeout without taking a byte, and SEND_BUFFER bytes
    answered, not closed by the client  a thread; LINGER_S

A client that lets a time pass counts as gone, its requests are cancelled. Where the system has no thread or no file for
one more connection, that one is closed, and the others go on. Knows gunicorn's threads, nothing of Flask or models.
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
"""Bytes the kernel may hold for a reader that is slower than its stream; the default grows to megabytes."""
PIECE = 128 * 1024
"""Bytes of a reply that are written under one timeout: a large reply to a slow, but living, client is no stall."""
LINGER_S = 2.0
"""After the last byte of a connection that closes, for the client's own close; RFC 9112 section 9.6."""
FULL_PAUSE_S = 0.05
"""Accepting rests so long when the system has no file for a connection and none here is idle: else it would spin."""
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)
"""Errors of the listening socket itself. All others are of one connection, which is gone (accept(2))."""
WARN_EVERY_S = 60.0
"""Between two warnings of the same lack, which comes with every connection while it lasts."""


class BoundedSocket(socket.socket):
    """A blocking socket whose reads share a deadline and whose writes may not stall.

    gunicorn calls `setblocking(True)` when a thread takes the connection over, to read a request: there the
    deadline begins.
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
        """Set the deadline of all reads to come."""
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
        # Never 0, which would mean not to wait at all and raise another error.
        self.settimeout(max(0.001, seconds))


def _gone(reason: str) -> ConnectionResetError:
    """gunicorn and werkzeug take a reset connection for what it is: no fault of ours, nothing to log."""
    return ConnectionResetError(errno.ECONNRESET, reason)


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A connection whose closing never waits: gunicorn would linger in the one thread that accepts."""

    def close(self, graceful: bool = False) -> None:
        util.close(self.sock)


class BoundedWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's threaded worker with bounded connections; idle ones, new ones too, wait without a thread.

    There may be a thread for every connection, started when it is needed: with a smaller pool, so many clients
    that stall would keep all others out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_keepalived = self.worker_connections
        self._next_warning_s = 0.0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Not gunicorn's: it warns of as many threads as connections, which is what is wanted here."""

    @property
    def num_busy(self) -> int:
        """Connections on which a request is arriving, being answered, or has just been."""
        return int(self.nr_conns - len(self.pending_conns) - len(self.keepalived_conns))

    def accept(self, listener: socket.socket) -> bool:
        """Take a connection that waits; whether one did. What is wrong with one never ends the worker."""
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno in BROKEN:
                raise
            if error.errno in FULL:
                self._warn("no file is free for one more connection (%s): see ulimit -n", error.strerror)
                if not self._close_idle():
                    time.sleep(FULL_PAUSE_S)
            return False
        try:
            self._watch(accepted, address, listener)
        except OSError as error:
            self._warn("a connection could not be taken: %s", error.strerror)
            accepted.close()
        return True

    def _watch(self, accepted: socket.socket, address: Any, listener: socket.socket) -> None:
        """Wait for the first byte of a new connection, without a thread."""
        settings = self.app.settings
        client = BoundedSocket(accepted, read_s=settings.read_timeout, write_s=settings.write_timeout)
        try:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if self.nr_conns >= self.worker_connections - 1:
                # At the limit. Accepting pauses only if none is idle.
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
        """Close the connection that has been idle longest; whether there was one."""
        waiting = [queue for queue in (self.pending_conns, self.keepalived_conns) if queue]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda queue: queue[0].timeout).popleft()
        self.poller.unregister(oldest.sock)
        self.nr_conns -= 1
        oldest.close()
        return True

    def on_pending_socket_readable(self, conn: Connection, client: socket.socket) -> None:
        if client.fileno() >= 0:  # closed to make room, by what was accepted in the same turn of the loop
            super().on_pending_socket_readable(conn, client)

    def on_client_socket_readable(self, conn: Connection, client: socket.socket) -> None:
        if client.fileno() >= 0:
            super().on_client_socket_readable(conn, client)

    def enqueue_req(self, conn: Connection) -> None:
        """Have a thread handle the connection; close it if the system starts none.

        The pool keeps what it was given even where it then fails to start a thread, so who is first decides: a thread
        that takes the work, or this one that cancels it.
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
                self._warn("no thread for one more connection (%s): see pids.max, ulimit -u; it is closed", error)

    def handle(self, conn: Connection) -> Any:
        """gunicorn's, in the connection's own thread; nothing that is raised leaves it."""
        try:
            is_kept = super().handle(conn)
            if not is_kept:
                # A client that is gone is not waited for.
                conn.sock.limit_reads(LINGER_S)
                util.close_graceful(conn.sock, timeout=LINGER_S)
        except BaseException as error:  # SystemExit, a panic of a Rust library: gunicorn's loop would end the worker
            self.log.error("a connection from %s failed", conn.client[0], exc_info=error)
            return False
        return is_kept

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer what is no request in the shape of every other error. Not gunicorn's: that is a page of HTML."""
        refusal = refusal_of(exc)
        if refusal.is_ours:
            self.log.error("a request from %s failed", addr[0], exc_info=exc)
        else:
            self.log.warning("refused what came from %s: %s", addr[0], refusal.message)
        with contextlib.suppress(OSError):
            client.sendall(refusal.to_bytes())

    def _warn(self, message: str, *values: Any) -> None:
        if time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + WARN_EVERY_S
            self.log.warning(message, *values)
