"""Does a request get the same tokens alone and in a batch? 100 greedy requests, one after another and 32 at once.

usage: python benchmarks/batch_invariance.py ARTIFACT [ARTIFACT ...] [--requests 100] [--batch 32] [--rounds 2]

The prompts are beginnings of the project's texts, 4 to 200 tokens long, the answers 8 to 48. Each round sends them in
another random order, the next as soon as one is done, so that rows join and leave at any time beside ever other rows.
Prints a table and one JSON line; exits with 1 if any request differs. About three minutes an artifact.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import calibration_data
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.commands.bench_runs import opened
from runtime.commands.roofline import describe_machine
from runtime.core import SamplingParams
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar
from runtime.text.tokenizer import Tokenizer
from runtime.text_model import TextModel

PROMPT_TOKENS, NEW_TOKENS = (4, 200), (8, 48)
CAPACITY = PROMPT_TOKENS[1] + NEW_TOKENS[1]
SEED = 0


class Request(NamedTuple):
    """A prompt, and how many greedy tokens are wanted of it."""

    prompt_ids: list[int]
    max_tokens: int


def requests_for(artifact: Artifact, count: int) -> list[Request]:
    """Beginnings of random places in the project's texts; the same at every call."""
    rng = random.Random(SEED)
    tokenizer = Tokenizer.from_artifact(artifact)
    texts = [tokenizer.encode(calibration_data.verification_text(name)) for name in calibration_data.EVALUATION_TEXTS]
    requests = []
    for _ in range(count):
        ids, length = rng.choice(texts), rng.randint(*PROMPT_TOKENS)
        start = rng.randrange(len(ids) - length)
        requests.append(Request(list(ids[start : start + length]), rng.randint(*NEW_TOKENS)))
    return requests


def answer(model: TextModel, request: Request) -> list[int]:
    """The greedy tokens. HeadraceError if the engine gives up."""
    params = SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True)
    events = list(model.generate(request.prompt_ids, params))
    if events[-1].error is not None:
        raise HeadraceError(f"the engine ended a request: {events[-1].error}")
    return [event.token_id for event in events if event.token_id is not None]


def measure(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """How many requests differ in any round, and where the first tokens part."""
    artifact = open_artifact(path, allow_failed=args.allow_failed)
    requests = requests_for(artifact, args.requests)
    differing: set[int] = set()
    earliest: int | None = None
    with (
        opened(artifact, batch=args.batch, capacity=CAPACITY) as (_, model, _),
        ThreadPoolExecutor(args.batch) as pool,
        progress_bar("requests", total=args.requests * (args.rounds + 1)) as bar,
    ):

        def one(request: Request) -> list[int]:
            tokens = answer(model, request)
            bar.update(1)
            return tokens

        alone = [one(request) for request in requests]
        for number in range(args.rounds):
            order = random.Random(SEED + number).sample(range(len(requests)), len(requests))
            together = pool.map(one, [requests[idx] for idx in order])
            for idx, tokens in zip(order, together, strict=True):
                if tokens != alone[idx]:
                    differing.add(idx)
                    first = next(
                        at for at, pair in enumerate(zip(tokens, alone[idx], strict=True)) if len(set(pair)) > 1
                    )
                    earliest = first if earliest is None else min(earliest, first)
    return {
        "artifact": artifact.manifest.name, "precision": artifact.manifest.precision, "requests": len(requests),
        "tokens": sum(map(len, alone)), "differing": len(differing), "earliest_difference": earliest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--requests", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="requests in flight; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="random orders; default: %(default)s")
    parser.add_argument("--allow-failed", action="store_true", help="take artifacts that failed their gate too")
    args = parser.parse_args()
    if min(args.requests, args.batch, args.rounds) < 1:
        parser.error("--requests, --batch and --rounds must be at least 1")
    print(f"{'precision':14}{'requests':>10}{'tokens':>8}{'rounds':>8}{'in flight':>11}{'differing':>11}")
    rows = []
    for path in args.artifacts:
        row = measure(path, args)
        print(
            f"{row['precision']:14}{row['requests']:10}{row['tokens']:8,}{args.rounds:8}{args.batch:11}"
            f"{row['differing']:11}   {path}",
            flush=True,
        )
        rows.append(row)
    head = {"benchmark": "batch_invariance", "machine": describe_machine()._asdict()}
    print(json.dumps({**head, "batch": args.batch, "rounds": args.rounds, "rows": rows}))
    if any(row["differing"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        sys.exit(f"batch_invariance: {error}")
