"""Thousands of bad requests, which the server must refuse without a 5xx, a traceback or a lost connection.

usage: python -m benchmarks.bad_requests [ARTIFACT] [--requests 20000] [--seed 0]

Hypothesis generates three kinds: good bodies with fields replaced by any value, bodies that are almost JSON, and
requests that are almost HTTP. Each goes to a real server on loopback, over a new connection or a kept one. Without an
artifact it uses a tiny random model. Prints a table, then one JSON line. The exit code is 1 if a demand is not met.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.serving import Server, served, tiny_artifact
from runtime.commands.roofline import describe_machine
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar
from serve.api.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from serve.fields.requests import CHAT_FIELDS, COMPLETION_FIELDS

REPLY_S = 60
ASKED_FOR = "late, as asked"
"""A 504 for a request with a too short `timeout` is not the server's fault."""
Json = dict[str, Any]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["user", "system", "text", "json_schema", "\ud800", "auto", 2**64, -(2**63), "", "\x00", "[" * 50]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1", "schema", "name"]), inner, max_size=4),
    ),
    max_leaves=8,
)
PATHS: dict[str, tuple[Json, Any]] = {
    "/v1/completions": ({"prompt": "hi", "max_tokens": 2}, COMPLETION_FIELDS),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, CHAT_FIELDS),
    "/tokenize": ({"prompt": "hi"}, TOKENIZE_FIELDS),
    "/detokenize": ({"tokens": [1]}, DETOKENIZE_FIELDS),
}


@st.composite
def requests(draw: st.DrawFn, model: str) -> bytes:
    """The bytes of one request: head and body."""
    path = draw(st.sampled_from(sorted(PATHS)))
    good, table = PATHS[path]
    names = [field.name for field in table]
    changes = draw(
        st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=4)), VALUES, min_size=1, max_size=4)
    )
    # An answer of thousands of tokens would be right, but take as long as a hundred requests.
    limited = {
        name: value for name, value in changes.items() if name not in ("max_tokens", "max_completion_tokens", "n")
    }
    body = json.dumps({"model": model, **good, **(limited or {"x": 1})}).encode()
    kind = draw(st.integers(0, 9))
    if kind >= 7:
        body = _mangle(draw, body)
    headers = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head = f"POST {path} HTTP/1.1\r\n{headers}".encode()
    if kind == 9:
        return _mangle(draw, head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def _mangle(draw: st.DrawFn, data: bytes) -> bytes:
    """Replace a piece by noise."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 20)))
    return data[:start] + draw(st.binary(max_size=12)) + data[end:]


def send(server: Server, data: bytes) -> str:
    """Send the bytes and shut down the sending side. Returns the status, or a word for any other outcome."""
    with socket.create_connection((server.host, server.port), timeout=REPLY_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            reply = b""
            while piece := connection.recv(65536):
                reply += piece
        except ConnectionError:
            return "closed"
        except TimeoutError:
            return "lost: no reply"
    if not reply:
        return "closed"
    return reply[9:12].decode("ascii", "replace") if reply.startswith(b"HTTP/1.") else f"no HTTP: {reply[:50]!r}"


def attack(server: Server, args: argparse.Namespace) -> Json:
    """Send all requests. Returns the counts of outcomes, and the first request of each 5xx or loss."""
    outcomes: Counter[str] = Counter()
    worst: list[str] = []
    started_s = time.perf_counter()
    with progress_bar("bad requests", total=args.requests, unit="request") as bar:

        @seed(args.seed)
        @settings(
            max_examples=args.requests,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=requests(server.model))
        def one(data: bytes) -> None:
            outcome = send(server, data)
            if outcome == "504" and b'"timeout"' in data:
                outcome = ASKED_FOR
            outcomes[outcome] += 1
            if outcome[0] not in "234c" and outcome != ASKED_FOR:
                worst.append(f"{outcome}: {data!r}"[:1000])
            bar.update(1)

        one()
    return {
        "requests": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "seconds": time.perf_counter() - started_s,
        "worst": worst[:5],
    }


def measure(artifact: Path, args: argparse.Namespace, scratch: Path) -> Json:
    errors = scratch / "errors"
    with served(artifact, errors, ["--max-len", "1024", "--read-timeout", "5"]) as server:
        found = attack(server, args)
        live = server.metric("headrace_requests_running") + server.metric("headrace_requests_waiting")
        found["stuck"] = int(live)
        found["is_ready"] = b"ready" in server.get("/readyz")
    found["tracebacks"] = errors.read_text().count("Traceback")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        artifact = args.artifact or tiny_artifact(Path(scratch))
        found = measure(artifact, args, Path(scratch))
    for name, value in found.items():
        print(f"{name:12}{value}")
    is_met = not (found["worst"] or found["tracebacks"] or found["stuck"]) and found["is_ready"]
    print("met" if is_met else "NOT MET")
    print(json.dumps({"benchmark": "bad_requests", "machine": describe_machine()._asdict(), **found}))
    return not is_met


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadraceError as error:
        sys.exit(f"bad_requests: {error}")
