"""The gain of batching: 32 requests at once against one after another, and HTTP against the engine alone.

usage: python benchmarks/concurrency.py ARTIFACT [ARTIFACT ...] [--requests 32] [--prompt 32] [--new-tokens 128]

Random prompts, greedy, without the end-of-text token, so that every run generates the same number of tokens (over HTTP
they are counted). The HTTP side is a real `headrace serve` on a free loopback port with streamed completions, stopped
by its process id. The clients are threads of plain http.client, which use little of the cores they share with the
server. Each round measures each way in turn. The table has medians over the rounds, and ratios within a round. Takes
about five minutes for each artifact. Prints a table, then one JSON line.
"""

import argparse
import http.client
import json
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from runtime.artifact.manifest import open_artifact
from runtime.commands.bench_runs import EngineRun, opened, random_ids, run_requests
from runtime.commands.roofline import describe_machine
from runtime.core import SamplingParams
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar

START_S = 300
"""Longest wait for the server. Hashing and loading a large artifact from a slow disk takes minutes."""
STOP_S = 60
REQUEST_S = 1800

TOGETHER_OVER_ALONE = 0.25
HTTP_SHARE = 0.9
OVERHEAD = 0.08


class Address(NamedTuple):
    """A server's address, and the name of its model."""

    host: str
    port: int
    model: str


@contextmanager
def served(artifact: str, args: argparse.Namespace, *flags: str) -> Iterator[Address]:
    """Start a server with these flags and wait until it is ready. Raises HeadraceError if it does not start."""
    command = [sys.executable, "-m", "headrace", "serve", artifact, "--port", "0"]
    command += ["--max-len", str(args.prompt + args.new_tokens), "--max-batch", str(args.requests)]
    command += ["--max-waiting", str(args.requests), *(["--allow-failed"] if args.allow_failed else [])]
    command += flags
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        is_told, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline() if is_told else ""
        if "http://" not in line:
            raise HeadraceError(f"`{' '.join(command)}` did not start; run it to see why")
        host, _, port = line.split("http://")[1].split()[0].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=STOP_S)
        connection.request("GET", "/v1/models")
        model = json.loads(connection.getresponse().read())["data"][0]["id"]
        connection.close()
        yield Address(host, int(port), model)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stream(address: Address, prompt_ids: list[int], num_tokens: int) -> None:
    """Read one streamed completion to its end. Raises HeadraceError if the number of tokens is wrong."""
    body = {
        "model": address.model,
        "prompt": prompt_ids,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(address.host, address.port, timeout=REQUEST_S)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    events = connection.getresponse().read().split(b"\n\n")
    connection.close()
    if len(events) < 3 or events[-2] != b"data: [DONE]":
        raise HeadraceError(f"the server broke off: {events[-1][-200:]!r}")
    usage = json.loads(events[-3].removeprefix(b"data: ")).get("usage") or {}
    if usage.get("completion_tokens") != num_tokens:
        raise HeadraceError(f"asked for {num_tokens} tokens, the server counts {usage.get('completion_tokens')}")


def run_http(address: Address, args: argparse.Namespace, prompts: list[list[int]], *, together: bool) -> float:
    """Seconds for all requests, as streams over HTTP."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(args.requests if together else 1) as pool:
        list(pool.map(lambda ids: stream(address, ids, args.new_tokens), prompts))
    return time.perf_counter() - started_s


def measure(artifact: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one artifact, with engine and HTTP measured in turn."""
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    capacity = args.prompt + args.new_tokens
    engine: dict[bool, list[EngineRun]] = {True: [], False: []}
    over_http: dict[bool, list[float]] = {True: [], False: []}
    with (
        opened(open_artifact(artifact, allow_failed=args.allow_failed), batch=args.requests, capacity=capacity) as (
            _,
            model,
            times,
        ),
        served(artifact, args) as address,
        progress_bar("concurrency", total=2 + 2 * args.repeat + 2 * args.repeat_alone, unit="run") as bar,
    ):
        prompts = random_ids(args.requests, args.prompt, model.vocab_size).tolist()

        def run_engine(*, together: bool) -> EngineRun:
            run = run_requests(model, times, batch=args.requests, prompt=args.prompt, params=params, together=together)
            bar.update(1)
            return run

        def http_seconds(*, together: bool) -> float:
            seconds = run_http(address, args, prompts, together=together)
            bar.update(1)
            return seconds

        run_engine(together=True)  # the first run allocates
        http_seconds(together=True)
        for turn in range(args.repeat):
            for together in (True, False) if turn < args.repeat_alone else (True,):
                engine[together].append(run_engine(together=together))
                over_http[together].append(http_seconds(together=together))
    return _figures(artifact, args, {key: [run.seconds for run in runs] for key, runs in engine.items()}, over_http) | {
        "overhead_share": statistics.median(
            run.overhead_share for run in engine[True] if run.overhead_share is not None
        )
    }


def _median_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _figures(
    artifact: str, args: argparse.Namespace, engine: dict[bool, list[float]], over_http: dict[bool, list[float]]
) -> dict[str, Any]:
    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=False))

    total = args.requests * args.new_tokens
    return {
        "artifact": artifact,
        "engine_tokens_per_s": total / statistics.median(engine[True]),
        "http_tokens_per_s": total / statistics.median(over_http[True]),
        "together_over_alone": ratio(engine[True], engine[False]),
        "http_together_over_alone": ratio(over_http[True], over_http[False]),
        "http_share": ratio(engine[True], over_http[True]),
        "engine_s": engine[True],
        "http_s": over_http[True],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--repeat-alone", type=int, default=1, help="rounds with one request after another")
    parser.add_argument("--allow-failed", action="store_true")
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if min(args.requests, args.prompt, args.new_tokens - 1, args.repeat_alone) < 1 or args.repeat < args.repeat_alone:
        parser.error("every number must be at least 1, --new-tokens 2, and --repeat no less than --repeat-alone")
    print(f"{'':34}{'engine':>8}{'HTTP':>8}{'HTTP/engine':>13}{'together/alone':>16}{'over HTTP':>11}{'overhead':>10}")
    rows = []
    for artifact in args.artifacts:
        row = measure(artifact, args)
        rows.append(row)
        overhead = "-" if row["overhead_share"] is None else f"{row['overhead_share']:.1%}"
        print(
            f"{artifact[-32:]:34}{row['engine_tokens_per_s']:8,.0f}{row['http_tokens_per_s']:8,.0f}"
            f"{row['http_share']:13.0%}{row['together_over_alone']:16.2f}{row['http_together_over_alone']:11.2f}"
            f"{overhead:>10}",
            flush=True,
        )
    targets = f"{f'>= {HTTP_SHARE:.0%}':>13}{f'<= {TOGETHER_OVER_ALONE}':>16}{'':11}{f'<= {OVERHEAD:.0%}':>10}"
    print(f"{'target':34}{'tok/s':>8}{'tok/s':>8}{targets}")
    settings = {name: value for name, value in vars(args).items() if name != "artifacts"}
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "concurrency", "machine": machine, "settings": settings, "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        sys.exit(f"concurrency: {error}")
