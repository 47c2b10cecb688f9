"""Client connections that cannot hold the server up: every wait on a socket has an end.

What each kind of connection costs, and for how long at most:

    idle, or not a byte sent yet      no thread; KEEPALIVE_S, less if its place is needed for a new one
    sending a request                 a thread; --read-timeout for all of it, so that drops of bytes do not help
    being answered                    a thread; --write-timeout without taking a byte, and SEND_BUFFER bytes
    answered, not closed by the client  a thread; LINGER_S

A client that lets a time pass counts as gone, its requests are cancelled. Knows gunicorn's threads, nothing of
Flask or models.
"""

import errno
import socket
import time
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

SEND_BUFFER = 256 * 1024
"""Bytes the kernel may hold for a reader that is slower than its stream; the default grows to megabytes."""
PIECE = 128 * 1024
"""Bytes of a reply that are written under one timeout: a large reply to a slow, but living, client is no stall."""
LINGER_S = 2.0
"""After the last byte of a connection that closes, for the client's own close; RFC 9112 section 9.6."""


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
        if flags & socket.MSG_DONTWAIT:
            self.settimeout(0)  # with a timeout Python waits for data before it looks at the flags
        else:
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

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Not gunicorn's: it warns of as many threads as connections, which is what is wanted here."""

    def accept(self, listener: socket.socket) -> None:
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED):
                return
            raise
        settings = self.app.settings
        client = BoundedSocket(accepted, read_s=settings.read_timeout, write_s=settings.write_timeout)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._make_room()
        self.nr_conns += 1
        connection = Connection(self.cfg, client, address, listener.getsockname())
        connection.set_timeout()
        self.pending_conns.append(connection)
        self.poller.register(client, EVENT_READ, partial(self.on_pending_socket_readable, connection))

    def _make_room(self) -> None:
        """At the limit, close the connection that has been idle longest. Accepting pauses only if none is idle."""
        if self.nr_conns < self.worker_connections - 1:
            return
        waiting = [queue for queue in (self.pending_conns, self.keepalived_conns) if queue]
        if waiting:
            oldest = min(waiting, key=lambda queue: queue[0].timeout).popleft()
            self.poller.unregister(oldest.sock)
            self.nr_conns -= 1
            oldest.close()

    def handle(self, conn: Connection) -> Any:
        is_kept = super().handle(conn)
        if not is_kept:
            # Here, in the connection's own thread; a client that is gone is not waited for.
            conn.sock.limit_reads(LINGER_S)
            util.close_graceful(conn.sock, timeout=LINGER_S)
        return is_kept
