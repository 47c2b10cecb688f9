"""Who waits for whom: what long prompts cost running streams, and what they cost short prompts.

usage: python benchmarks/fairness.py ARTIFACT [ARTIFACT ...] [--streams 8] [--long 768] [--short 32] [--repeat 24]

One engine of its own. Greedy streams run all the time; three situations in turn, until each was measured often enough:

    alone    the streams, and nothing else
    long     a long prompt arrives, is prefilled, and the next one arrives
    short    the same, and in the middle of each long prompt a short one arrives

Measured are the times between two tokens of a stream, and from the arrival of the short prompts to their first token.
Every step decodes all streams and prefills at most one chunk. So the first is bounded by a decode step and a chunk, and
the second by two of those, for a short prompt arrives between two steps: a long prompt's turn, and its own. Both runs
are measured in the same process, and the bounds are made of their medians. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifact.manifest import open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.commands.bench_runs import decode, prefill, random_ids
from runtime.commands.roofline import describe_machine
from runtime.core import Request, SamplingParams, TokenEvent
from runtime.engine.engine import Engine
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar
from runtime.session.session import Batch

CHUNK = 128
SLACK = 1.5
"""p99 may be so many times its bound: the bound is made of medians, and the engine has its own work to do."""
RUNS = 9
"""Of each kind, to know what a step takes."""


class Clients:
    """Asks one engine, and notes when the tokens come."""

    def __init__(self, session: OrtSession, seed: int = 0) -> None:
        self.engine = Engine(session, prefill_chunk=CHUNK)
        self._rng = np.random.default_rng(seed)
        self._vocab_size = session.info.vocab_size
        self._count = 0

    def ask(self, length: int, num_tokens: int) -> list[float]:
        """Submit a random prompt; the list, in seconds, grows: its arrival, then every token."""
        times = [time.perf_counter()]

        def sink(event: TokenEvent) -> None:
            times.append(time.perf_counter())

        self._count += 1
        request = Request(
            request_id=str(self._count),
            prompt_ids=self._rng.integers(0, self._vocab_size, length).tolist(),
            params=SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True),
            eos_ids=frozenset(),
            sink=sink,
        )
        self.engine.add(self.engine.prepare(request))
        return times

    def cancel_all(self) -> None:
        """End what runs."""
        for request_id in list(self.engine.live):
            self.engine.cancel(request_id)


def situation(clients: Clients, name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds between tokens of the streams, and to the first tokens of short and long prompts."""
    num_chunks = -(-args.long // CHUNK)
    streams = [clients.ask(16, args.capacity - 16) for _ in range(args.streams)]
    while not all(len(times) > 2 for times in streams):
        clients.engine.step()
    num_before = [len(times) for times in streams]
    first: dict[str, list[float]] = {"short": [], "long": []}
    for _ in range(args.repeat):
        long = clients.ask(args.long, 1) if name != "alone" else []
        short: list[float] = []
        for step in range(num_chunks):
            if name == "short" and step == num_chunks // 2:
                short = clients.ask(args.short, 1)
            clients.engine.step()
        while len(long) == 1 or len(short) == 1:
            clients.engine.step()
        first["long"] += [long[1] - long[0]] if long else []
        first["short"] += [short[1] - short[0]] if short else []
    gaps = [
        after - before
        for times, start in zip(streams, num_before, strict=True)
        for before, after in zip(times[start - 1 :], times[start:], strict=False)
    ]
    clients.cancel_all()
    return {"gap": gaps, **first}


def step_seconds(session: OrtSession, args: argparse.Namespace) -> tuple[float, float]:
    """Medians of a decode step of the streams, and of the last chunk of a long prompt, the dearest."""
    decodes, chunks = [], []
    prefill(session, args.long, slot=args.streams)
    ids, wanted = random_ids(1, CHUNK, session.info.vocab_size), np.array([CHUNK - 1])
    last = Batch(args.streams, ids, np.full(1, args.long - CHUNK, np.int32), np.full(1, CHUNK, np.int32), wanted)
    for _ in range(RUNS):
        decodes.append(decode(session, args.streams, args.capacity // 2, 4))
        started_s = time.perf_counter()
        session.run(last)
        chunks.append(time.perf_counter() - started_s)
    return statistics.median(decodes), statistics.median(chunks)


def measure(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one artifact, in milliseconds."""
    artifact = open_artifact(path, allow_failed=args.allow_failed)
    session = OrtSession.open(artifact, num_slots=args.streams + 2, capacity=args.capacity, threads=args.threads)
    clients = Clients(session)
    found: dict[str, dict[str, list[float]]] = {}
    with progress_bar("fairness", total=3, unit="situation") as bar:
        for name in ("alone", "long", "short"):
            found[name] = situation(clients, name, args)
            bar.update(1)
    decode_s, chunk_s = step_seconds(session, args)
    session.close()
    rows = {name: {"gap": _quantiles(item["gap"])} for name, item in found.items()}
    rows["short"]["first token, short prompt"] = _quantiles(found["short"]["short"])
    rows["long"]["first token, long prompt"] = _quantiles(found["long"]["long"])
    return {
        "artifact": Path(path).name,
        "decode_ms": 1000 * decode_s,
        "chunk_ms": 1000 * chunk_s,
        "gap_bound_ms": 1000 * (decode_s + chunk_s),
        "short_bound_ms": 2000 * (decode_s + chunk_s),
        "rows": rows,
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"num": len(seconds), "p50_ms": 1000 * float(p50), "p99_ms": 1000 * float(p99)}


def show(found: dict[str, Any]) -> None:
    """The table of one artifact."""
    print(f"{found['artifact']}: a decode step {found['decode_ms']:.1f} ms, a chunk {found['chunk_ms']:.1f} ms")
    bounds = {"gap": found["gap_bound_ms"], "first token, short prompt": found["short_bound_ms"]}
    for situation_name, rows in found["rows"].items():
        for what, row in rows.items():
            bound = "" if what not in bounds or situation_name == "alone" else f"{bounds[what]:9.1f}"
            print(
                f"  {situation_name:8}{what:28}{row['num']:7}{row['p50_ms']:9.1f}{row['p99_ms']:9.1f}{bound}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--long", type=int, default=768, help="tokens of a long prompt")
    parser.add_argument("--short", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=24, help="long prompts of each situation")
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--allow-failed", action="store_true")
    args = parser.parse_args()
    if min(args.streams, args.short, args.repeat) < 1 or not CHUNK <= args.long < args.capacity:
        parser.error(f"every number must be at least 1, and --long from {CHUNK} to below --capacity")
    if 20 + args.repeat * (args.long // CHUNK + 3) > args.capacity - 16:
        parser.error("the streams would end before the measurement: lower --repeat or raise --capacity")
    print(f"{'':38}{'number':>7}{'p50':>9}{'p99':>9}{'bound':>9}   ms")
    measured = [measure(artifact, args) for artifact in args.artifacts]
    for found in measured:
        show(found)
    is_met = all(
        found["rows"][name][what]["p99_ms"] <= SLACK * found[bound]
        for found in measured
        for name, what, bound in (
            ("long", "gap", "gap_bound_ms"),
            ("short", "gap", "gap_bound_ms"),
            ("short", "first token, short prompt", "short_bound_ms"),
        )
    )
    print(f"p99 within {SLACK} times its bound: {'met' if is_met else 'NOT MET'}")
    settings = {name: value for name, value in vars(args).items() if name != "artifacts"}
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "fairness", "machine": machine, "settings": settings, "artifacts": measured}))
    return not is_met


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadraceError as error:
        sys.exit(f"fairness: {error}")
