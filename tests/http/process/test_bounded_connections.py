"""Clients that stall, trickle, never speak or never read: none of them keeps others out or holds a slot."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from tests.support.fake_text_model import NAME
from tests.support.server_process import ServerProcess, eventually, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ("--read-timeout", "1", "--write-timeout", "1", "--max-connections", "100", "--capacity", "60000")
    with running_server("--num-slots", "4", *flags) as process:
        yield process


def connect(server: ServerProcess, stack: ExitStack, *, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    address = urlsplit(server.url)
    connection.settimeout(20)
    connection.connect((address.hostname, address.port))
    return stack.enter_context(connection)


def is_well(server: ServerProcess) -> bool:
    """Answered at once: the patience is far above what an idle machine takes, and far below any stall here."""
    return httpx.get(f"{server.url}/healthz", timeout=10).status_code == 200


def request(body: bytes, length: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def ended_within(connection: socket.socket, seconds: float) -> bytes:
    """What the server still said before it closed the connection."""
    connection.settimeout(seconds)
    said = b""
    try:
        while data := connection.recv(65536):
            said += data
    except ConnectionResetError:
        pass
    return said


def test_more_idle_connections_than_there_are_places(server: ServerProcess) -> None:
    with ExitStack() as stack:
        idle = [connect(server, stack) for _ in range(150)]
        assert is_well(server)
        # The longest idle made room; the latest are still there and work.
        idle[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle[-1].recv(1000)
        assert ended_within(idle[0], 5) == b""


def test_half_a_request_is_given_up(server: ServerProcess) -> None:
    pieces = [b"GET /v1/mod", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n", request(b'{"model": ', 500)]
    with ExitStack() as stack:
        halves = [connect(server, stack) for _ in range(60)]
        for number, connection in enumerate(halves):
            connection.sendall(pieces[number % len(pieces)])
        assert is_well(server)
        for number, connection in enumerate(halves):
            said = ended_within(connection, 10)
            assert said == b"" or (number % 3 == 2 and b" 408 " in said)


def test_a_request_in_drops_is_given_up(server: ServerProcess) -> None:
    with ExitStack() as stack:
        connection = connect(server, stack)
        started_s = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"G")
                time.sleep(0.1)
        # One second for the whole of it, not for each drop; ten would be all of them.
        assert time.monotonic() - started_s < 8


def test_a_reader_that_stops_loses_its_slot(server: ServerProcess) -> None:
    body = {"model": NAME, "prompt": "a", "max_tokens": 50_000, "ignore_eos": True, "stream": True, "logprobs": 20}
    with ExitStack() as stack:
        for _ in range(4):
            connection = connect(server, stack, receive_buffer=4096)
            connection.sendall(request(json.dumps(body).encode()))
        eventually(lambda: server.metric("headrace_requests_running") == 4, "all slots are taken")
        # 50,000 tokens take minutes: the slots are free because the readers were given up.
        eventually(lambda: server.metric("headrace_requests_running") == 0, "the slots are free")
        assert is_well(server)


def test_clients_that_do_not_close_do_not_hold_up_accepting(server: ServerProcess) -> None:
    """Each of them is waited for two seconds: in threads of their own, or this would take a minute."""
    with ExitStack() as stack:
        started_s = time.monotonic()
        for _ in range(30):
            connection = connect(server, stack)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
        assert time.monotonic() - started_s < 20


def test_headers_are_limited(server: ServerProcess) -> None:
    many = {f"X-{number}": "y" for number in range(100)}
    for headers in (many, {"X-Long": "y" * 20_000}):
        answer = httpx.get(f"{server.url}/healthz", headers=headers)
        assert answer.status_code in (400, 431)
    assert httpx.get(f"{server.url}/{'x' * 10_000}").status_code in (400, 414)


def test_a_large_prompt_and_bad_utf8(server: ServerProcess) -> None:
    url = f"{server.url}/v1/completions"
    large = httpx.post(url, json={"model": NAME, "prompt": "x" * 2**20}, timeout=60)
    assert large.status_code == 400 and large.json()["error"]["code"] == "context_length_exceeded"
    bad = httpx.post(url, content=b'{"model": "\xff\xfe"}', headers={"Content-Type": "application/json"})
    assert bad.status_code == 400
    too_large = httpx.post(url, content=b" " * (4 * 2**20 + 1), headers={"Content-Type": "application/json"})
    assert too_large.status_code == 413
