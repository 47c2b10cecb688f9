"""What the prefix cache is worth, and what it costs those who gain nothing.

usage: python benchmarks/prefix_cache.py ARTIFACT [ARTIFACT ...] [--shared 1000] [--tail 16] [--repeat 5]

Time to first token of a prompt whose first 1,000 tokens were seen before, against the same length unseen, in turn; and
the time for unseen prompts alone (16 of 256 tokens, 8 new ones each) on an engine with the cache against one without,
in turn: what hashing and copying costs. Medians of ratios of the same round. One to three minutes an artifact. Prints a
table, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from runtime.artifact.manifest import open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.commands.roofline import describe_machine
from runtime.core import Request, SamplingParams
from runtime.engine.engine import Engine
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar

COLD_REQUESTS, COLD_PROMPT, COLD_TOKENS = 16, 256, 8
COLD_SLOTS = 8
CACHE_BYTES = 2 * 10**9
FASTER = 10.0
COLD_LOSS = 0.02


def seconds(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    """From the first prompt's arrival until all have so many tokens."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    started_s = time.perf_counter()
    for idx, prompt in enumerate(prompts):
        request = Request(
            request_id=str(idx), prompt_ids=prompt, params=params, eos_ids=frozenset(), sink=lambda event: None
        )
        engine.add(engine.prepare(request))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started_s


def measure(artifact: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one artifact."""
    rng = np.random.default_rng(0)
    capacity = max(args.shared + args.tail + 1, COLD_PROMPT + COLD_TOKENS)
    opened = open_artifact(artifact, allow_failed=args.allow_failed)
    session = OrtSession.open(opened, num_slots=COLD_SLOTS, capacity=capacity, threads=args.threads)

    def ids(length: int) -> list[int]:
        unseen: list[int] = rng.integers(0, session.info.vocab_size, length).tolist()
        return unseen

    with_cache, without = Engine(session, prefix_cache=CACHE_BYTES), Engine(session)
    shared = ids(args.shared)
    seconds(with_cache, [shared + ids(args.tail)], 1)
    cold_s, warm_s, paid = [], [], []
    with progress_bar("prefix cache", total=2 * args.repeat, unit="round") as bar:
        for _ in range(args.repeat):
            cold_s.append(seconds(without, [ids(args.shared + args.tail)], 1))
            warm_s.append(seconds(with_cache, [shared + ids(args.tail)], 1))
            bar.update(1)
        for turn in range(args.repeat):
            prompts = [ids(COLD_PROMPT) for _ in range(COLD_REQUESTS)]
            order = (with_cache, without) if turn % 2 else (without, with_cache)
            times = {engine: seconds(engine, prompts, COLD_TOKENS) for engine in order}
            paid.append(times[with_cache] / times[without] - 1)
            bar.update(1)
    session.close()
    return {
        "artifact": artifact,
        "cold_ttft_s": statistics.median(cold_s),
        "warm_ttft_s": statistics.median(warm_s),
        "faster": statistics.median(cold / warm for cold, warm in zip(cold_s, warm_s, strict=True)),
        "cold_loss": statistics.median(paid),
        "cold_losses": paid,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--shared", type=int, default=1000)
    parser.add_argument("--tail", type=int, default=16, help="tokens of each prompt after the shared ones")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--allow-failed", action="store_true")
    args = parser.parse_args()
    if min(args.shared, args.tail, args.repeat) < 1:
        parser.error("every number must be at least 1")
    print(f"{'':34}{'TTFT unseen':>13}{'TTFT shared':>13}{'faster':>9}{'cost when unseen':>18}")
    rows = []
    for artifact in args.artifacts:
        row = measure(artifact, args)
        rows.append(row)
        print(
            f"{artifact[-32:]:34}{row['cold_ttft_s'] * 1000:10,.0f} ms{row['warm_ttft_s'] * 1000:10,.0f} ms"
            f"{row['faster']:8.1f}x{row['cold_loss']:18.1%}",
            flush=True,
        )
    print(f"{'target':34}{'':26}{f'>= {FASTER:.0f}x':>9}{f'<= {COLD_LOSS:.0%}':>18}")
    settings = {name: value for name, value in vars(args).items() if name != "artifacts"}
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "prefix_cache", "machine": machine, "settings": settings, "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        sys.exit(f"prefix_cache: {error}")
