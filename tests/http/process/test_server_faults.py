"""What a server process survives: a system without threads or files, odd bytes, clients that speak as it ends."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from tests.support.fake_text_model import NAME
from tests.support.server_process import Caller, ServerProcess, children_of, eventually, running_server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 3, "ignore_eos": True}).encode()
MIB = 2**20


@contextlib.contextmanager
def connections(server: ServerProcess, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many of them, each with its first bytes sent."""
    address = urlsplit(server.url)
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=20)
            opened.append(stack.enter_context(connection))
            with contextlib.suppress(ConnectionError):
                connection.sendall(first)
        yield opened


def ask(server: ServerProcess, data: bytes) -> bytes:
    """Everything that comes back until the server closes the connection."""
    with connections(server, 1, data) as (connection,):
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            said += piece
    return said


def worker_of(server: ServerProcess) -> int:
    (worker,) = children_of(server.process.pid)
    return worker


def status_of(pid: int, field: str) -> str:
    """A line of what the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def stop(pid: int) -> None:
    """Have the process stand still: what is sent to it now is met all at once, when it goes on."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: status_of(pid, "State") == "T", "it stands still")


def is_pending(pid: int, number: int) -> bool:
    return bool(int(status_of(pid, "ShdPnd"), 16) & 1 << (number - 1))


def num_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def is_well(server: ServerProcess) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{server.url}/healthz", timeout=10).status_code == 200
    return False


def assert_survived(server: ServerProcess, worker: int, words: str) -> None:
    """The same worker answers, and one line says what was short."""
    eventually(lambda: is_well(server), "the server answers")
    assert worker_of(server) == worker
    server.signal(signal.SIGTERM)
    code, _, err = server.wait()
    assert code == 0 and err.count("\n") == 1 and words in err


def test_a_thread_that_cannot_be_started_closes_one_connection() -> None:
    with running_server("--read-timeout", "1") as server:
        worker = worker_of(server)
        pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
        # Room for a few stacks of 8 MiB: 60 threads find none.
        size = pages * resource.getpagesize() + 100 * MIB
        resource.prlimit(worker, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        with connections(server, 60, b"G") as opened:
            closed = [connection for connection in opened if read_all(connection) == b""]
            assert len(closed) == 60, "the others in time, for they send no more"
        resource.prlimit(worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert_survived(server, worker, "no thread for one more connection")


@pytest.mark.parametrize("first", [b"", b"G"], ids=["idle", "busy"])
def test_a_file_that_cannot_be_had_costs_no_other_connection(first: bytes) -> None:
    with running_server("--read-timeout", "1") as server:
        worker = worker_of(server)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (num_files(worker) + 10, 4096))
        with connections(server, 30, first):
            assert is_well(server)
        assert_survived(server, worker, "no file is free for one more connection")


def test_an_idle_connection_that_speaks_as_it_makes_room_is_closed_alone() -> None:
    """One turn of the loop accepts a connection, closes an old one for it, and then hears of the old one's bytes."""
    with running_server("--max-connections", "16") as server:
        worker = worker_of(server)
        with connections(server, 15) as old:
            eventually(lambda: num_files(worker) > 15, "they are accepted")
            stop(worker)
            with connections(server, 8):
                for connection in old:
                    connection.sendall(b"G")
                os.kill(worker, signal.SIGCONT)
                eventually(lambda: is_well(server), "the server answers")
        assert worker_of(server) == worker


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--log-format", "json", "--step-s", "0.002") as process:
        yield process


REFUSED = {
    b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n": 400,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nX\x1b[31m: c\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n": 400,
    b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n": 414,
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 70 + b"\r\n": 431,
    HEAD + b"Transfer-Encoding: x\r\n\r\n": 501,
    HEAD + b"Expect: x\r\n\r\n": 417,
    HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n" + BODY: 400,
    HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n" + BODY: 400,
    b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n": 403,
    b"GET /x/metrics HTTP/1.1\r\nHost: localhost\r\nSCRIPT_NAME: /x\r\nConnection: close\r\n\r\n": 404,
}


def test_refusals_of_every_layer_have_one_shape_and_logs_too() -> None:
    with running_server("--log-format", "json") as server:
        for data, status in REFUSED.items():
            head, _, body = ask(server, data).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode()), (data[:60], head)
            assert b"Content-Type: application/json" in head and b"\r\nX-Request-Id: " in head
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        server.signal(signal.SIGTERM)
        code, _, err = server.wait()
    lines = [json.loads(line) for line in err.splitlines()]
    assert code == 0 and len(lines) >= 9
    assert {line["level"] for line in lines} == {"warning"}, "nothing here is the server's fault"
    assert all("127.0.0.1" in line["message"] for line in lines)


def test_an_offer_to_change_the_protocol_is_no_reason_to_refuse(server: ServerProcess) -> None:
    """Java's HTTP client offers h2c with every first request, and sends its body in chunks."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    with connections(server, 1, HEAD + offer + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) as (connection,):
        # And the connection is good for a second request.
        for data in (b"", HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY):
            connection.sendall(data)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.version, answer.status) == (11, 200)
            assert len(json.loads(answer.read())["choices"]) == 1


def test_a_stream_over_http_1_0_has_no_chunks(server: ServerProcess) -> None:
    body = BODY[:-1] + b', "stream": true}'
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
    head, _, events = ask(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ") and b"Transfer-Encoding" not in head
    assert events.startswith(b"data: {") and events.endswith(b"\n\ndata: [DONE]\n\n")


def test_who_speaks_as_the_server_ends_is_told_and_who_is_silent_is_not_waited_for() -> None:
    with running_server() as server, connections(server, 1), ExitStack() as stack:
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)
        halves = stack.enter_context(connections(server, 3, head[:40]))
        httpx.get(f"{server.url}/healthz")  # what came before it has been read
        worker = worker_of(server)
        stop(worker)
        unread = stack.enter_context(connections(server, 3, head + BODY))
        server.signal(signal.SIGTERM)
        eventually(lambda: is_pending(worker, signal.SIGTERM), "the master has passed the signal on")
        os.kill(worker, signal.SIGCONT)
        for connection in halves:
            connection.sendall(head[40:] + BODY)
        for connection in (*halves, *unread):
            assert read_all(connection).startswith(b"HTTP/1.1 503 ")
        # Within its patience: a connection that never sent a byte would be waited for half a minute.
        assert server.wait()[::2] == (0, "")


def test_a_failed_engine_ends_the_process_where_that_is_asked_for() -> None:
    flags = ("--num-slots", "1", "--step-s", "0.02", "--fail-after", "30", "--exit-on-failure", "--cors-origin", "*")
    with running_server(*flags) as server:
        callers = [Caller(server.url, max_tokens=200) for _ in range(3)]
        for caller in callers:
            caller.join(20)
        code, _, err = server.wait()
        assert code == 70 and "the session broke" in err and "ends with exit code 70" in err
        assert "Worker" not in err, "the master adds nothing"
        assert err.count("--cors-origin * without --api-keys") == 1
        assert callers[0].error is not None and "the session broke" in callers[0].error
