"""`headrace serve` against llama.cpp's server and OpenVINO GenAI's pipeline under the same load, in turn.

usage: python -m benchmarks.versus_servers [--ours w8a8] [--peers llamacpp,openvino] [--shape qwen2.5-0.5b]
                                           [--device cpu] [--clients 1,8,32] [--repeat 5] [--save FILE]

A closed loop: each client asks its next prompt when its last answer has ended. Prompts are random tokens, 120 to 180 of
them, different in every round and the same on every side; answers are greedy, 64 tokens long. Both servers stream over
HTTP to the same client (benchmarks/load_client.py); OpenVINO's pipeline runs in a process of its own without HTTP, so
it has an advantage. TTFT is the time to a request's first token, TPOT the mean time between its tokens after that.

The other sides are loaded and idle while one is measured. Figures are medians over the rounds, of rates and of each
round's percentiles; ratios are medians of ratios within a round. With --save the rounds are kept in a file, and the
tables count all that the file has: so five rounds may be five commands. A round of 32 clients takes a minute.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import versus_openvino_genai
from benchmarks.llamacpp_server import llamacpp_server, server_binary
from benchmarks.peer import Ours, add_common_flags, our_artifacts, peer_python
from benchmarks.peer_models import quantized_gguf_of
from benchmarks.peer_process import running_worker
from benchmarks.serving import served
from benchmarks.versus_llamacpp import LLAMACPP
from benchmarks.versus_openvino_genai import OPENVINO_GENAI
from runtime.commands.roofline import describe_machine
from runtime.errors import HeadraceError
from runtime.machine.progress import progress_bar

PROMPT, SPREAD, NEW_TOKENS = 150, 30, 64
WARM_TOKENS, WARM_SEED = 16, 1_000_000
CONTEXT = 320
"""Tokens that a slot of each server holds."""
LOAD_CLIENT = Path(__file__).with_name("load_client.py")
VOCABULARY = (1000, 40_000)
HEADRACE, LLAMACPP_KEY, OPENVINO_KEY = "headrace", "llamacpp", "openvino"
FILE_TYPES = {"w8a8": "Q8_0", "w8a16": "Q8_0", "w4a16": "Q4_0"}
WANTED = f"wanted: {LLAMACPP_KEY} >= 2.5 and TTFT <= 0.5 of its, {OPENVINO_KEY} >= 1.2, all at 32 clients"


class Load(NamedTuple):
    """What one side is asked."""

    clients: int
    prompts: list[list[int]]
    new_tokens: int

    @classmethod
    def of_round(cls, clients: int, num_requests: int, seed: int, new_tokens: int = NEW_TOKENS) -> "Load":
        """Random prompts that no other round has."""
        rng = np.random.default_rng((seed, clients))
        lengths = rng.integers(PROMPT - SPREAD, PROMPT + SPREAD + 1, num_requests)
        return cls(clients, [rng.integers(*VOCABULARY, length).tolist() for length in lengths], new_tokens)


Side = Callable[[Load], dict[str, Any]]
"""Runs a load: {"seconds": s, "times": [[first, ..., last], ...]}."""


class Round(NamedTuple):
    """One side's figures of one load; seconds."""

    side: str
    clients: int
    round: int
    tokens_per_s: float
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float
    tpot_p95: float

    @classmethod
    def of(cls, side: str, load: Load, idx: int, answer: Mapping[str, Any]) -> "Round":
        """What the side measured, as percentiles."""
        first = [times[0] for times in answer["times"]]
        between = [(times[-1] - times[0]) / (NEW_TOKENS - 1) for times in answer["times"]]
        rate = len(first) * NEW_TOKENS / answer["seconds"]
        percentiles = [float(value) for of in (first, between) for value in np.quantile(of, [0.5, 0.95])]
        return cls(side, load.clients, idx, rate, *percentiles)


def open_sides(stack: ExitStack, one: Ours, args: argparse.Namespace) -> dict[str, Side]:
    """Every side with its model loaded, ours first."""
    client = stack.enter_context(running_worker(Path(sys.executable), LOAD_CLIENT, Path()))
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def over_http(host: str, port: int, model: str) -> Side:
        return lambda load: client.ask({"host": host, "port": port, "model": model, **load._asdict()})

    slots, peers = max(args.clients), args.peers.split(",")
    flags = ["--device", args.device, "--max-batch", str(slots), "--max-waiting", str(slots), "--max-len", str(CONTEXT)]
    server = stack.enter_context(served(one.artifact.path, logs / "headrace", [*flags, *args.serve_flags.split()]))
    sides = {HEADRACE: over_http(server.host, server.port, server.model)}
    if LLAMACPP_KEY in peers:
        gguf = quantized_gguf_of(
            args.shape, args.cache, peer_python(LLAMACPP, args.cache), FILE_TYPES[one.artifact.manifest.precision]
        )
        binary = server_binary(args.cache)
        sides[LLAMACPP_KEY] = over_http(
            *stack.enter_context(llamacpp_server(binary, gguf, slots=slots, context=CONTEXT, log=logs / "llamacpp"))
        )
    if OPENVINO_KEY in peers:
        python = peer_python(OPENVINO_GENAI, args.cache)
        model = versus_openvino_genai.model(python, args.cache, args.shape, "int8")
        peer = stack.enter_context(running_worker(python, OPENVINO_GENAI.worker, model))
        sides[OPENVINO_KEY] = lambda load: peer.ask(load._asdict())
    return sides


def measure(sides: Mapping[str, Side], args: argparse.Namespace, first_round: int) -> Iterator[Round]:
    """All rounds; sides in turn. A short load warms each side up first."""
    with progress_bar("in turn", total=len(args.clients) * len(sides) * (args.repeat + 1), unit="load") as bar:
        for clients in args.clients:
            for idx in range(-1, args.repeat):
                number = first_round + idx
                load = (
                    Load.of_round(clients, clients, WARM_SEED + number, WARM_TOKENS)
                    if idx < 0
                    else Load.of_round(clients, args.requests or max(4, 2 * clients), number)
                )
                for name, run in sides.items():
                    answer = run(load)
                    bar.update(1)
                    if idx >= 0:
                        yield Round.of(name, load, number, answer)


def table(rounds: Sequence[Round]) -> str:
    """A line for each side and number of clients; milliseconds."""
    lines = [
        f"{'clients':>7}  {'':12}{'rounds':>6}{'tokens/s':>10}{'TTFT p50':>10}{'p95':>8}{'TPOT p50':>10}{'p95':>8}"
        f"{'ratio':>8}{'TTFT ratio p50':>16}{'p95':>6}"
    ]
    for clients in sorted({one.clients for one in rounds}):
        for side in dict.fromkeys(one.side for one in rounds):
            found = {one.round: one for one in rounds if (one.side, one.clients) == (side, clients)}
            ours = {one.round: one for one in rounds if (one.side, one.clients) == (HEADRACE, clients)}
            if found:
                pairs = [(ours[idx], found[idx]) for idx in found if side != HEADRACE and idx in ours]
                lines.append(_line(side, clients, list(found.values())) + (_ratios(pairs) if pairs else ""))
    return "\n".join(lines)


def _line(side: str, clients: int, rounds: Sequence[Round]) -> str:
    """Medians over the rounds."""

    def median(figure: str) -> float:
        return float(statistics.median(getattr(one, figure) for one in rounds))

    return (
        f"{clients:7}  {side:12}{len(rounds):6}{median('tokens_per_s'):10,.1f}"
        f"{1e3 * median('ttft_p50'):10,.0f}{1e3 * median('ttft_p95'):8,.0f}"
        f"{1e3 * median('tpot_p50'):10.1f}{1e3 * median('tpot_p95'):8.1f}"
    )


def _ratios(pairs: Sequence[tuple[Round, Round]]) -> str:
    """Ours over theirs."""
    rate, p50, p95 = (
        statistics.median(getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs)
        for figure in ("tokens_per_s", "ttft_p50", "ttft_p95")
    )
    return f"{rate:8.2f}{p50:16.2f}{p95:6.2f}"


def _run(args: argparse.Namespace) -> None:
    (one,) = our_artifacts(args.ours, args.cache, args.shape)
    kept: list[Round] = []
    if args.save and args.save.exists():
        kept = [Round(**json.loads(line)) for line in args.save.read_text().splitlines()]
    first_round = 1 + max((found.round for found in kept), default=-1)
    with ExitStack() as stack:
        for found in measure(open_sides(stack, one, args), args, first_round):
            kept.append(found)
            if args.save:
                with args.save.open("a") as file:
                    file.write(json.dumps(found._asdict()) + "\n")
    print(f"{one.name}, {args.shape}, --device {args.device}; {WANTED}")
    print(table(kept))
    head = {"benchmark": "versus_servers", "shape": args.shape, "device": args.device, "ours": one.kind}
    rounds = [found._asdict() for found in kept]
    print(json.dumps({**head, "machine": describe_machine()._asdict(), "rounds": rounds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default="w8a8", help="a precision of ours, or NAME=ARTIFACT; default: %(default)s")
    peers = f"{LLAMACPP_KEY},{OPENVINO_KEY}"
    parser.add_argument("--peers", default=peers, metavar="LIST", help="default: %(default)s")
    add_common_flags(parser)
    parser.add_argument("--clients", default="1,8,32", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--requests", type=int, help="of each round, by default two a client and four at least")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the rounds here, and count those that are here")
    parser.add_argument("--serve-flags", default="", metavar="FLAGS", help="more flags for our server")
    args = parser.parse_args()
    args.clients = sorted({int(number) for number in args.clients.split(",")})
    if not set(args.peers.split(",")) <= {LLAMACPP_KEY, OPENVINO_KEY, ""}:
        parser.error(f"--peers must be of {peers}")
    try:
        _run(args)
    except HeadraceError as error:
        sys.exit(f"versus_servers: {error}")


if __name__ == "__main__":
    main()
