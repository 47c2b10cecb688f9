"""The gain of batching for an evaluation: many short texts scored together, and one at a time, over HTTP.

usage: python -m benchmarks.scoring ARTIFACT [--texts 128] [--length 12] [--repeat 3]

The server is a real one on a free loopback port. Texts are random token ids, sent as evaluators send them: `echo`,
`logprobs` 1, `max_tokens` 0. "One at a time" sends one text per request, one after another; "together" sends all texts
in one request. Each round measures both in turn. The table has medians, and ratios within a round. Prints a table, then
one JSON line.
"""

import argparse
import http.client
import json
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.concurrency import Address, served
from runtime.commands.roofline import describe_machine
from runtime.errors import HeadraceError

SEED = 7
REQUEST_S = 600
WANTED = 5.0
MAX_ID = 40_000


def score(connection: http.client.HTTPConnection, address: Address, texts: list[list[int]]) -> list[list[float | None]]:
    """The log-probabilities of each text's tokens."""
    body = {"model": address.model, "prompt": texts, "max_tokens": 0, "echo": True, "logprobs": 1}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != http.client.OK:
        raise HeadraceError(f"the server answered {response.status}: {answer['error']['message']}")
    return [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]


def measure(address: Address, texts: list[list[int]], repeat: int) -> dict[str, Any]:
    """Seconds of both ways in each round, and the largest difference of their scores."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=REQUEST_S)
    score(connection, address, texts)  # the first run allocates
    alone_s, together_s = [], []
    apart = 0.0
    for _ in range(repeat):
        started_s = time.perf_counter()
        together = score(connection, address, texts)
        middle_s = time.perf_counter()
        alone = [score(connection, address, [text])[0] for text in texts]
        alone_s.append(time.perf_counter() - middle_s)
        together_s.append(middle_s - started_s)
        pairs = zip(together, alone, strict=True)
        apart = max(
            apart, *(abs((a or 0) - (b or 0)) for left, right in pairs for a, b in zip(left, right, strict=True))
        )
    connection.close()
    ratios = [alone / together for alone, together in zip(alone_s, together_s, strict=True)]
    return {
        "together_s": statistics.median(together_s),
        "alone_s": statistics.median(alone_s),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "largest_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--length", type=int, nargs="+", default=[4, 12, 32], help="tokens of a text")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    # The queue has room for every text at once.
    limits = argparse.Namespace(prompt=max(args.length), new_tokens=4, requests=args.texts, allow_failed=False)
    rows = []
    print(f"{'':34}{'tokens':>7}{'together':>11}{'alone':>11}{'ratio':>7}{'range':>14}{'apart':>9}")
    for artifact in args.artifacts:
        with served(artifact, limits, "--max-choices", str(args.texts)) as address:
            for length in args.length:
                texts = np.random.default_rng(SEED).integers(100, MAX_ID, (args.texts, length)).tolist()
                figures = measure(address, texts, args.repeat)
                rows.append({"artifact": artifact, "length": length, "texts": args.texts, **figures})
                low, high = figures["ratio_range"]
                print(
                    f"{artifact[-32:]:34}{length:7}{figures['together_s']:10.2f}s{figures['alone_s']:10.2f}s"
                    f"{figures['ratio']:7.2f}{f'{low:.2f}-{high:.2f}':>14}{figures['largest_difference']:9.1e}",
                    flush=True,
                )
    print(f"wanted: at least {WANTED:g}")
    print(json.dumps({"rows": rows, "machine": describe_machine()}))


if __name__ == "__main__":
    main()
