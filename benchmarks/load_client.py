"""A closed loop of streamed completions against an OpenAI-compatible server, in a process of its own.

Run by benchmarks/versus_servers.py: JSON lines in, JSON lines out. It answers {"host": h, "port": p, "model": m,
"clients": c, "prompts": [[id, ...], ...], "new_tokens": n} with {"seconds": s, "times": [[first, last], ...]}: each
request's seconds from its connection to its first and its last event. A client asks its next prompt when its last one
has ended. One thread waits for all sockets and looks for two marks only, so that it takes little of the cores that it
shares with the server. Needs nothing but the standard library.
"""

import json
import re
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

TIMEOUT_S = 600
EVENT, END = b"data: {", b"data: [DONE]"
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


class Stream:
    """One request: its socket, what came, and when."""

    def __init__(self, address: tuple[str, int], body: bytes) -> None:
        self.started_s = time.perf_counter()
        self.first_s = self.last_s = 0.0
        self._tail = b""
        self.socket = socket.create_connection(address, TIMEOUT_S)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall(head.encode() + body)

    def read(self) -> bool:
        """Take what there is; True at the end of the stream."""
        data = self.socket.recv(65536)
        self._tail = self._tail[-4096:] + data
        if not self.first_s and EVENT in self._tail:
            self.first_s = time.perf_counter() - self.started_s
        if not self.last_s and END in self._tail:
            self.last_s = time.perf_counter() - self.started_s
        return not data

    def times(self, new_tokens: int) -> list[float]:
        """First and last event; SystemExit with the reply if it is not what was asked for."""
        self.socket.close()
        counted = _USAGE.findall(self._tail)
        if not self.last_s or not counted or int(counted[-1]) != new_tokens:
            raise SystemExit(f"the server did not send {new_tokens} tokens: {self._tail[-500:]!r}")
        return [self.first_s, self.last_s]


def closed_loop(address: tuple[str, int], bodies: Iterator[bytes], clients: int, new_tokens: int) -> dict[str, Any]:
    """All requests; seconds in all, and of each its first and last event."""
    times: list[list[float]] = []
    started_s = time.perf_counter()
    with selectors.DefaultSelector() as selector:

        def ask() -> None:
            body = next(bodies, None)
            if body is not None:
                stream = Stream(address, body)
                selector.register(stream.socket, selectors.EVENT_READ, stream)

        for _ in range(clients):
            ask()
        while selector.get_map():
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise SystemExit(f"the server sent nothing for {TIMEOUT_S} s")
            for key, _ in ready:
                if key.data.read():
                    selector.unregister(key.fileobj)
                    times.append(key.data.times(new_tokens))
                    ask()
    return {"seconds": time.perf_counter() - started_s, "times": times}


def body_of(model: str, prompt: list[int], new_tokens: int) -> bytes:
    """A greedy completion that ends by its length."""
    return json.dumps({
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip


def main() -> None:
    print(json.dumps({"version": ""}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        bodies = [body_of(asked["model"], prompt, asked["new_tokens"]) for prompt in asked["prompts"]]
        address = (asked["host"], asked["port"])
        print(json.dumps(closed_loop(address, iter(bodies), asked["clients"], asked["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
