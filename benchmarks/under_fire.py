"""The server under load: many clients, of whom many hang up, and then clients that stall in every way.

usage: python -m benchmarks.under_fire [ARTIFACT] [--requests 10000] [--concurrent 64] [--hang-up 0.3] [--idle 2000]

Without an artifact it uses a tiny random model; with the default model 10,000 requests take hours on two cores. The
server is real, on loopback, with drafts and a prefix cache that is soon full, stopped by its process id. Two parts:

    storm   requests with every feature, mixed at random (benchmarks/shots.py), 64 at a time; 30 % of the clients hang
            up: with half a request sent, right after it, or in the middle of the reply
    siege   2,000 idle connections, half requests, readers that read nothing, and prompts of 1 MB, while good requests
            go on

Demands: no request is lost or stuck in a slot; no 5xx except 504 for requests with a too short `timeout` (counted
apart); nothing on standard error; resident memory grows by less than 3 % after the first fifth of the storm, the
warm-up. Prints a table, then one JSON line. The exit code is 1 if a demand is not met. Takes three minutes with the
tiny model.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serving import Server, served, tiny_artifact
from benchmarks.shots import BAD, COMPLETIONS, LATE, MISSING, OK, Shot, is_whole, make_shot
from runtime.commands.roofline import describe_machine
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar

REPLY_S = 120
"""A reply that takes longer counts as lost."""
SETTLE_S = 20
"""Time after the last client has gone, until every slot must be free."""
MAX_GROWTH = 0.03
NUM_SLOTS, MAX_LEN, ANSWER = 16, 1024, 100
PREFIX_CACHE = "4MB"
"""About 150 blocks of the tiny model: the cache is full and evicts long before the warm-up ends."""
SHORTCUTS = ("prompt_tokens", "prefix_cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens")
"""Metrics that show whether drafts and the prefix cache were used."""
RIGHT = ("answered", "hung up", "late, as asked")
Json = dict[str, Any]


def encode(shot: Shot, padding: int = 0) -> bytes:
    body = json.dumps(shot.body).encode() + b" " * padding
    head = f"POST {shot.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def fire(server: Server, shot: Shot, rng: random.Random, hang_up: float) -> str:
    """Send one request and return its outcome as a word."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    data = encode(shot)
    try:
        if rng.random() < hang_up:
            where = rng.random()
            writer.write(data[: len(data) // 2] if where < 0.2 else data)
            await writer.drain()
            if where > 0.5:
                await reader.read(rng.randint(1, 3000))
            await asyncio.sleep(rng.random() * 0.05)
            return "hung up"
        writer.write(data)
        reply = await asyncio.wait_for(reader.read(-1), REPLY_S)
    except TimeoutError:
        return "lost: no reply"
    except OSError as error:
        return f"lost: {type(error).__name__}"
    finally:
        writer.close()
    status = int(reply[9:12] or b"0")
    if status not in shot.statuses:
        return f"status {status} for {shot.path}: {reply[-200:]!r}"
    if status == LATE:
        return "late, as asked"
    return "answered" if status != OK or is_whole(shot, reply) else f"lost: cut short: {reply[-200:]!r}"


async def fill(server: Server) -> None:
    """Use all that the server reserves: slots, prefix cache, room for the logits of a chunk.

    Linux provides memory when it is first written, so reserved memory would later look like growth.
    """
    rng = random.Random()
    for has_scores in (False, True):
        prompts = [[rng.randrange(200) for _ in range(MAX_LEN - ANSWER)] for _ in range(NUM_SLOTS)]
        body: Json = {"model": server.model, "max_tokens": ANSWER, "ignore_eos": True}
        body |= {"echo": True, "logprobs": 0} if has_scores else {}
        outcomes = await asyncio.gather(
            *(fire(server, Shot(COMPLETIONS, body | {"prompt": prompt}), rng, 0.0) for prompt in prompts)
        )
        if set(outcomes) != {"answered"}:
            raise HeadraceError(f"the server could not be filled: {outcomes}")


async def storm(server: Server, args: argparse.Namespace) -> Json:
    """The first part: counts of outcomes, requests per second, memory after the warm-up and at the end."""
    rng = random.Random(args.seed)
    await fill(server)
    outcomes: Counter[str] = Counter()
    memory: list[int] = []
    shots = iter(range(args.requests))
    started_s = time.perf_counter()
    with progress_bar("storm", total=args.requests, unit="request") as bar:

        async def gunner() -> None:
            for number in shots:
                shot = make_shot(rng, server.model)
                outcomes[await fire(server, shot, random.Random(number), args.hang_up)] += 1
                bar.update(1)
                if number % max(1, args.requests // 50) == 0:
                    memory.append(server.rss_bytes())

        await asyncio.gather(*(gunner() for _ in range(args.concurrent)))
    seconds = time.perf_counter() - started_s
    memory.append(server.rss_bytes())
    warm = max(memory[: max(1, len(memory) // 5)])
    return {
        "outcomes": dict(outcomes.most_common(12)),
        "requests_per_s": args.requests / seconds,
        "rss_warm_bytes": warm,
        "rss_end_bytes": memory[-1],
        "rss_growth": memory[-1] / warm - 1,
        "rss_mb": [round(value / 1e6, 1) for value in memory],
    }


async def stalled(server: Server, data: bytes, *, receive_buffer: int | None = None) -> asyncio.StreamWriter:
    """Open a connection that sends this and then neither sends nor reads."""
    _, writer = await asyncio.open_connection(server.host, server.port, limit=receive_buffer or 2**16)
    writer.write(data)
    await writer.drain()
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport has it
    return writer


async def siege(server: Server, args: argparse.Namespace) -> Json:
    """The second part: good requests among clients that stall."""
    rng = random.Random(args.seed)
    long = {"model": server.model, "prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True, "logprobs": 20}
    data = encode(Shot(COMPLETIONS, long))
    writers = [await stalled(server, b"") for _ in range(args.idle)]
    writers += [await stalled(server, data[: len(data) // 2]) for _ in range(args.concurrent)]
    writers += [await stalled(server, data) for _ in range(args.concurrent // 4)]
    outcomes: Counter[str] = Counter()
    large = Shot(COMPLETIONS, {"model": server.model, "prompt": "x" * 2**20}, (BAD,))
    broken = Shot(COMPLETIONS, {"model": "\ud800", "prompt": "x"}, (BAD, MISSING))
    latencies = []
    for number in range(args.requests // 50):
        shot = [large, broken][number % 2] if number % 8 == 0 else make_shot(rng, server.model)
        sent_s = time.perf_counter()
        outcomes[await fire(server, shot, rng, 0.0)] += 1
        latencies.append(time.perf_counter() - sent_s)
    threads = server.num_threads()
    for writer in writers:
        writer.transport.abort()
    latencies.sort()
    return {
        "outcomes": dict(outcomes.most_common(12)),
        "connections": len(writers),
        "threads": threads,
        "p50_s": latencies[len(latencies) // 2],
        "p99_s": latencies[int(len(latencies) * 0.99)],
    }


def stuck_requests(server: Server) -> int:
    """Requests that still hold a slot, or wait for one, after all clients have gone."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        live = server.metric("headrace_requests_running") + server.metric("headrace_requests_waiting")
        if live == 0 or time.monotonic() > deadline:
            return int(live)
        time.sleep(0.1)


def count_5xx(server: Server) -> dict[str, int]:
    """Responses of 5xx by status. A 504 is right for a request with a short `timeout`; `fire` checks the others."""
    found: Counter[str] = Counter()
    for line in server.get("/metrics").decode().splitlines():
        if "http_responses_total" in line and (status := re.search(r'status="(5..)"', line)):
            found[status[1]] += int(float(line.split()[-1]))
    return dict(found)


def measure(artifact: Path, args: argparse.Namespace, scratch: Path) -> Json:
    flags = ["--max-len", str(MAX_LEN), "--max-batch", str(NUM_SLOTS), "--max-waiting", "1000", "--read-timeout", "10"]
    # Some requests ask for a priority of -5.
    flags += ["--speculate", "--prefix-cache", PREFIX_CACHE, "--priority", "-5"]
    errors = scratch / "errors"
    with served(artifact, errors, flags) as server:
        found: Json = {"storm": asyncio.run(storm(server, args))}
        found["storm"]["stuck"] = stuck_requests(server)
        found["siege"] = asyncio.run(siege(server, args))
        found["siege"]["stuck"] = stuck_requests(server)
        found["http_5xx"] = count_5xx(server)
        found["tokens"] = {name: int(server.metric(f"headrace_{name}_total")) for name in SHORTCUTS}
    found["complaints"] = errors.read_text()[-2000:]
    return found


def unmet(found: Json) -> list[str]:
    """The demands that were not met, in words."""
    wrong = []
    for part in ("storm", "siege"):
        wrong += [f"{part}: {word}" for word in found[part]["outcomes"] if word not in RIGHT]
        if found[part]["stuck"]:
            wrong.append(f"{part}: {found[part]['stuck']} requests stuck")
    wrong += [f"{num} responses of {status}" for status, num in found["http_5xx"].items() if status != str(LATE)]
    if found["complaints"]:
        wrong.append(f"standard error: {found['complaints']!r}")
    if found["storm"]["rss_growth"] >= MAX_GROWTH:
        wrong.append(f"memory grew by {found['storm']['rss_growth']:.1%}")
    return wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--hang-up", type=float, default=0.3)
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        artifact = args.artifact or tiny_artifact(Path(scratch))
        found = measure(artifact, args, Path(scratch))
    for part in ("storm", "siege"):
        for name, value in found[part].items():
            shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            print(f"{part:8}{name:18}{shown}")
    for name in ("http_5xx", "tokens"):
        print(f"{'':8}{name:18}{found[name]}")
    problems = unmet(found)
    for problem in problems:
        print(f"NOT MET: {problem}")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(
        json.dumps({"benchmark": "under_fire", "machine": describe_machine()._asdict(), "settings": settings, **found})
    )
    return bool(problems)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadraceError as error:
        sys.exit(f"under_fire: {error}")
