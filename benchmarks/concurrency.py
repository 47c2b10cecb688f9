"""What batching is worth: 32 requests together against one after another, and HTTP against the engine alone.

usage: python benchmarks/concurrency.py ARTIFACT [ARTIFACT ...] [--requests 32] [--prompt 32] [--new-tokens 128]

Greedy, made-up prompts, end of text ignored, so that both ways generate the same tokens. All four ways take turns, so
that a slow minute of the machine falls on each; ratios are medians over the turns, of which the first round (engine and
HTTP together) only warms up. Client and server share the cores, so HTTP's share pays for both. The HTTP side is a real
`headrace serve` on a free loopback port with streamed completions; it is stopped by its process id. Prints a table,
then one JSON line.
"""

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from runtime.bench import StepTimes
from runtime.core import SamplingParams
from runtime.roofline import describe_machine
from runtime.settings import EngineSettings
from runtime.text_model import TextModel, open_text_model

STOP_TIMEOUT_S = 60  # draining takes up to 30


def prompts(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    return [[(7 + 13 * row + 31 * idx) % vocab_size for idx in range(args.prompt)] for row in range(args.requests)]


def run_engine(model: TextModel, args: argparse.Namespace, *, together: bool) -> float:
    """Seconds for all requests through the engine."""
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    started_s = time.perf_counter()
    if together:
        for generation in [model.generate(ids, params) for ids in prompts(args, model.vocab_size)]:
            assert len(list(generation)) == args.new_tokens
    else:
        for ids in prompts(args, model.vocab_size):
            assert len(list(model.generate(ids, params))) == args.new_tokens
    return time.perf_counter() - started_s


@contextmanager
def served(artifact: str, args: argparse.Namespace) -> Any:
    """A server of its own; yields host, port and model name."""
    settings = ["--max-len", str(args.prompt + args.new_tokens), "--max-batch", str(args.requests)]
    command = [sys.executable, "-m", "headrace", "serve", artifact, "--port", "0", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start (exit {process.wait(STOP_TIMEOUT_S)}): {line!r}")
        host, port = line.split("http://")[1].split()[0].split(":")
        yield host, int(port), line.split()[3]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stream(address: tuple[str, int, str], ids: list[int], num_tokens: int) -> None:
    """One streamed completion; every token must arrive, by the server's own count."""
    host, port, name = address
    connection = http.client.HTTPConnection(host, port, timeout=600)
    body = {
        "model": name,
        "prompt": ids,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    data = connection.getresponse().read()
    connection.close()
    events = data.decode().strip().split("\n\n")
    assert len(events) > 1 and events[-1] == "data: [DONE]", data[-300:]
    usage = json.loads(events[-2].removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] == num_tokens, usage


def run_http(address: tuple[str, int, str], args: argparse.Namespace, ids: list[list[int]], *, together: bool) -> float:
    """Seconds for all requests as HTTP streams."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(args.requests if together else 1) as pool:
        list(pool.map(lambda one: stream(address, one, args.new_tokens), ids))
    return time.perf_counter() - started_s


def measure(artifact: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one artifact; engine and HTTP in turn."""
    times = StepTimes()
    settings = EngineSettings(max_batch=args.requests, max_waiting=args.requests, max_len=args.prompt + args.new_tokens)
    model = open_text_model(artifact, settings, allow_failed=True, observer=times)
    model.start()
    run_engine(model, args, together=True)
    times.steps.clear()
    seconds: dict[str, list[float]] = {"engine": [], "http": [], "alone": [], "http_alone": []}
    ids = prompts(args, model.vocab_size)
    with served(artifact, args) as address:
        run_http(address, args, ids, together=True)
        for turn in range(args.repeat):
            seconds["engine"].append(run_engine(model, args, together=True))
            seconds["http"].append(run_http(address, args, ids, together=True))
            if turn < args.repeat_alone:
                seconds["alone"].append(run_engine(model, args, together=False))
                seconds["http_alone"].append(run_http(address, args, ids, together=False))
    model.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    total = args.requests * args.new_tokens
    return {
        "artifact": artifact,
        "engine_tokens_per_s": total / median["engine"],
        "http_tokens_per_s": total / median["http"],
        "together_over_alone": ratio(seconds["engine"], seconds["alone"]),
        "http_together_over_alone": ratio(seconds["http"], seconds["http_alone"]),
        "http_share": ratio(seconds["engine"], seconds["http"]),
        "seconds": seconds,
        "overhead_share": times.overhead_share(args.requests),
    }


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios turn by turn, over the turns that have both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--repeat-alone", type=int, default=5, help="turns that also run one after another, minutes each"
    )
    args = parser.parse_args()
    for name in ("requests", "prompt", "new_tokens", "repeat", "repeat_alone"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    print(f"{'':34}{'engine':>8}{'HTTP':>8}{'HTTP/engine':>13}{'together/alone':>16}{'over HTTP':>11}{'overhead':>10}")
    rows = []
    for artifact in args.artifacts:
        row = measure(artifact, args)
        rows.append(row)
        share = row["overhead_share"]
        overhead = "-" if share is None else f"{share:.1%}"
        print(
            f"{artifact[-32:]:34}{row['engine_tokens_per_s']:8,.0f}{row['http_tokens_per_s']:8,.0f}"
            f"{row['http_share']:13.0%}{row['together_over_alone']:16.2f}{row['http_together_over_alone']:11.2f}"
            f"{overhead:>10}",
            flush=True,
        )
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "concurrency", **vars(args), "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
