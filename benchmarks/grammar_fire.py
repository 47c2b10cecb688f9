"""The server against schemas, expressions and grammars that are made to use up time, memory or stack.

usage: python -m benchmarks.grammar_fire [ARTIFACT] [--seconds 30] [--at-once 4]

Two parts, on a real server on loopback, stopped by its process id:

    alone   each bomb of tests/support/schemas/bombs.py by itself: status, seconds, and the worker's memory afterwards
    beside  four bombs at once, again and again, beside two streams and a client that asks for JSON in new forms; every
            second form needs a trial compilation (it has a pattern)

Demands: bombs get 200, 400 or 429 within 15 s, and the same worker answers to the end; the streams go on; the other
client gets 200; at the end memory is within 100 MB of its value after every slot was used once. Prints tables, then one
JSON line. The exit code is 1 if a demand is not met.
"""

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.serving import Server, served, tiny_artifact
from runtime.commands.roofline import describe_machine
from runtime.core import Constraint, ConstraintKind
from runtime.errors import HeadraceError
from tests.support.schemas.bombs import bombs

MAX_REPLY_S = 15
MAX_GROWTH_BYTES = 100 * 10**6
"""64 MB of it are the kept grammars."""
REPLY_S = 120
NUM_SLOTS, MAX_LEN = 8, 1024
FIELDS = {ConstraintKind.REGEX: "regex", ConstraintKind.GRAMMAR: "grammar"}
Json = dict[str, Any]


class Reply(NamedTuple):
    status: int
    seconds: float
    message: str


def form_of(constraint: Constraint) -> Json:
    """The request field for a constraint."""
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        schema = json.loads(constraint.source)
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}}
    if constraint.kind is ConstraintKind.CHOICE:
        return {"structured_outputs": {"choice": json.loads(constraint.source)}}
    return {"structured_outputs": {FIELDS[constraint.kind]: constraint.source}}


def ask(server: Server, form: Json, *, max_tokens: int = 40) -> Reply:
    """Send one request and read the whole reply. The status is 0 without a reply."""
    body = {"model": server.model, "prompt": "Answer:", "max_tokens": max_tokens, "temperature": 1, **form}
    connection = http.client.HTTPConnection(server.host, server.port, timeout=REPLY_S)
    started_s = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    except OSError as error:
        return Reply(0, time.perf_counter() - started_s, str(error))
    finally:
        connection.close()
    message = json.loads(text)["error"]["message"] if response.status != 200 else ""
    return Reply(response.status, time.perf_counter() - started_s, message)


def fill(server: Server) -> None:
    """Use every slot completely: Linux provides memory when it is first written, which would look like growth."""
    body: Json = {"ignore_eos": True}
    with ThreadPoolExecutor(NUM_SLOTS) as pool:
        prompts = [f"{number} " * ((MAX_LEN - 200) // 2) for number in range(NUM_SLOTS)]
        jobs = [
            pool.submit(ask, server, body | {"prompt": prompt[: MAX_LEN - 100]}, max_tokens=50) for prompt in prompts
        ]
        statuses = {job.result().status for job in jobs}
    if statuses != {200}:
        raise HeadraceError(f"the server could not be filled: {statuses}")
    ask(server, fresh_form(-1))


def alone(server: Server) -> Json:
    """The first part: a row for each bomb."""
    rows = []
    for name, constraint in bombs():
        reply = ask(server, form_of(constraint))
        rows.append(
            {"bomb": name, "status": reply.status, "seconds": reply.seconds, "rss_mb": server.rss_bytes() / 1e6}
        )
        print(f"{reply.status} {reply.seconds:6.2f} s {rows[-1]['rss_mb']:7.0f} MB  {name}: {reply.message[:100]}")
    return {"rows": rows}


def fresh_form(number: int) -> Json:
    """A new schema. Every second one has a pattern, so that it needs a trial compilation."""
    code: Json = {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"} if number % 2 else {"enum": ["a", "b"]}
    schema = {"type": "object", "properties": {f"code{number}": code}, "required": [f"code{number}"]}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}}


class Siege:
    """The second part: all clients at once, until the time is over."""

    def __init__(self, server: Server, seconds: float) -> None:
        self._server = server
        self._end_s = time.perf_counter() + seconds
        self._bombs = list(bombs())
        self.bomb_statuses: Counter[int] = Counter()
        self.slowest_bomb_s = 0.0
        self.gaps_s: list[float] = []
        self.forms: list[Reply] = []
        self.max_rss_bytes = 0
        self._lock = threading.Lock()

    def throw(self, first: int, step: int) -> None:
        """Send the bombs in turn, each changed a little, because the server keeps grammars."""
        number = first
        while time.perf_counter() < self._end_s:
            _, bomb = self._bombs[number % len(self._bombs)]
            constraint = Constraint(bomb.kind, bomb.source + " " * (1 + number // len(self._bombs)), bomb.param)
            reply = ask(self._server, form_of(constraint))
            with self._lock:
                self.bomb_statuses[reply.status] += 1
                self.slowest_bomb_s = max(self.slowest_bomb_s, reply.seconds)
                self.max_rss_bytes = max(self.max_rss_bytes, self._server.rss_bytes())
            number += step

    def stream(self) -> None:
        """Read streams of plain text and note the time between events."""
        body = {"model": self._server.model, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        while time.perf_counter() < self._end_s:
            connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=REPLY_S)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            last_s = None
            while line := response.readline():
                if line.startswith(b"data: {"):
                    now_s = time.perf_counter()
                    if last_s is not None:
                        self.gaps_s.append(now_s - last_s)
                    last_s = now_s
                    if now_s > self._end_s:
                        break
            connection.close()

    def ask_for_forms(self) -> None:
        number = 0
        while time.perf_counter() < self._end_s:
            self.forms.append(ask(self._server, fresh_form(number), max_tokens=60))
            number += 1


def beside(server: Server, args: argparse.Namespace) -> Json:
    """The second part, first without bombs for comparison."""
    found: Json = {}
    for name, num_bombers in (("quiet", 0), ("bombs", args.at_once)):
        siege = Siege(server, args.seconds if num_bombers else args.seconds / 2)
        with ThreadPoolExecutor(num_bombers + 3) as pool:
            jobs = [pool.submit(siege.throw, first, num_bombers) for first in range(num_bombers)]
            jobs += [pool.submit(siege.stream), pool.submit(siege.stream), pool.submit(siege.ask_for_forms)]
            for job in jobs:
                job.result()
        gaps_ms = sorted(1e3 * gap for gap in siege.gaps_s)
        found[name] = {
            "bomb_statuses": dict(siege.bomb_statuses),
            "slowest_bomb_s": siege.slowest_bomb_s,
            "stream_tokens": len(gaps_ms),
            "stream_gap_ms_median_p99_max": [
                gaps_ms[len(gaps_ms) // 2],
                gaps_ms[len(gaps_ms) * 99 // 100],
                gaps_ms[-1],
            ],
            "forms": len(siege.forms),
            "form_statuses": dict(Counter(reply.status for reply in siege.forms)),
            "form_s_median_max": [
                statistics.median(reply.seconds for reply in siege.forms),
                max(reply.seconds for reply in siege.forms),
            ],
            "max_rss_mb": siege.max_rss_bytes / 1e6,
        }
        print(name, json.dumps(found[name], indent=2))
    return found


def failures(found: Json, growth_bytes: float) -> list[str]:
    """The demands that are not met, in words."""
    rows, beside_bombs = found["alone"]["rows"], found["beside"]["bombs"]
    problems = [f"{row['bomb']}: status {row['status']}" for row in rows if row["status"] not in (200, 400, 429)]
    problems += [f"{row['bomb']}: {row['seconds']:.1f} s" for row in rows if row["seconds"] > MAX_REPLY_S]
    if set(beside_bombs["bomb_statuses"]) - {200, 400, 429}:
        problems.append(f"bombs beside others: {beside_bombs['bomb_statuses']}")
    if beside_bombs["slowest_bomb_s"] > MAX_REPLY_S:
        problems.append(f"a bomb took {beside_bombs['slowest_bomb_s']:.1f} s")
    if set(beside_bombs["form_statuses"]) != {200}:
        problems.append(f"others' forms: {beside_bombs['form_statuses']}")
    if growth_bytes > MAX_GROWTH_BYTES:
        problems.append(f"the worker has {growth_bytes / 1e6:.0f} MB more than before")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Bombs against structured output.")
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--at-once", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        errors = Path(directory) / "errors"
        artifact = args.artifact or tiny_artifact(Path(directory))
        flags = ["--max-batch", str(NUM_SLOTS), "--max-len", str(MAX_LEN)]
        with served(artifact, errors, flags) as server:
            fill(server)
            before = server.rss_bytes()
            found: Json = {"alone": alone(server), "beside": beside(server, args)}
            after = server.rss_bytes()
            os.kill(server.pid, 0)
        complaints = errors.read_text()
    print(f"worker: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
    problems = failures(found, after - before)
    if complaints:
        problems.append(f"standard error: {complaints[-500:]}")
    found |= {"rss_before_mb": before / 1e6, "rss_after_mb": after / 1e6, "problems": problems}
    print("\n".join(problems) or "all demands met")
    print(json.dumps({"benchmark": "grammar_fire", "machine": describe_machine()._asdict(), **found}))
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadraceError as error:
        sys.exit(f"grammar_fire: {error}")
