"""What speculation is worth: tokens a second with drafts against without, on text to copy and on text with none.

usage: python -m benchmarks.speculation ARTIFACT [ARTIFACT ...] [--new-tokens 128] [--repeat 3]

Chat requests (benchmarks/speculation_tasks.py), greedy, one at a time: three that copy their prompt (edit a text,
extract to JSON, continue a log), three that do not, and three held to a schema or a tool's arguments; then eight at a
time, four of each of the first two kinds: 24 requests in all, prompts out of the prefix cache, measured while all
eight slots are taken. One session, an engine with drafts and one without, in turn; medians of
ratios of the same round. Tokens a second from the first token on. `same` is the share of requests with the very same
tokens. Four to ten minutes an artifact. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speculation_tasks import COPY, HELD, PLAIN, Task
from runtime.artifact.manifest import open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.commands.roofline import describe_machine
from runtime.core import Constraint, Request, SamplingParams, TokenEvent, Usage
from runtime.engine.engine import Engine
from runtime.engine.speculation.speculator import Speculator
from runtime.errors import HeadraceError
from runtime.grammar.grammar import GrammarCompiler
from runtime.machine.progress import progress_bar
from runtime.text.chat.template import TEMPLATE_FILE, load_chat_template
from runtime.text.tokenizer import Tokenizer

ALONE = 3
"""Tasks of each kind that are measured one at a time; the batch takes all four."""
CAPACITY = 1024
NUM_SLOTS = 8
TURNS = 3
"""How often each task comes in the mixed load: a slot that an answer leaves is taken at once, as when serving."""
PREFIX_CACHE_BYTES = 1 << 28
TARGETS = {"copy": 2.0, "nothing to copy": 0.97, "8 at a time": 1.2}


class Asked(NamedTuple):
    """A task as it goes to the engine."""

    prompt_ids: list[int]
    constraint: Constraint | None


class Answers(NamedTuple):
    """Tokens of every request, tokens a second after the first, and what was drafted."""

    token_ids: list[list[int]]
    rate: float
    usages: list[Usage]


def answer(engine: Engine, requests: list[Request]) -> Answers:
    """Run the requests together. The clock runs from when all that have a slot have their first token, and until
    nobody waits for one; where nobody does, to the end."""
    events = [list[TokenEvent]() for _ in requests]
    for request, own in zip(requests, events, strict=True):
        request.sink = own.append
        engine.add(engine.prepare(request))
    num_first = min(len(requests), NUM_SLOTS)
    while not all(events[:num_first]):
        engine.step()
    num_before, started_s = sum(map(len, events)), time.perf_counter()
    has_queue = len(requests) > NUM_SLOTS
    while engine.stats().num_waiting if has_queue else engine.has_work:
        engine.step()
    rate = (sum(map(len, events)) - num_before) / (time.perf_counter() - started_s)
    while engine.has_work:
        engine.step()
    token_ids = [[event.token_id for event in item if event.token_id is not None] for item in events]
    return Answers(token_ids, rate, [request.usage for request in requests])


class Comparison:
    """Rounds of the same requests with drafts and without."""

    def __init__(
        self, session: OrtSession, compiler: GrammarCompiler, eos_ids: frozenset[int], args: argparse.Namespace
    ) -> None:
        self._plain = Engine(session, prefix_cache=PREFIX_CACHE_BYTES)
        self._drafting = Engine(session, prefix_cache=PREFIX_CACHE_BYTES, drafter=Speculator())
        self._compiler, self._eos_ids = compiler, eos_ids
        self._args = args

    def measure(self, name: str, asked: list[Asked], bar: Any) -> dict[str, Any]:
        """Ratio of the rates, share of equal answers, share of right drafts."""
        rounds = []
        for turn in range(self._args.repeat + 1):
            engines = [self._plain, self._drafting]
            answers = {
                engine: answer(engine, [self._request(idx, one) for idx, one in enumerate(asked)])
                for engine in (engines if turn % 2 else engines[::-1])
            }
            bar.update(1)
            if turn:  # the first round allocates
                rounds.append((answers[self._plain], answers[self._drafting]))
        drafted = sum(usage.num_drafted for _, with_drafts in rounds for usage in with_drafts.usages)
        accepted = sum(usage.num_accepted for _, with_drafts in rounds for usage in with_drafts.usages)
        pairs = [
            pair for plain, with_drafts in rounds for pair in zip(plain.token_ids, with_drafts.token_ids, strict=True)
        ]
        return {
            "task": name,
            "plain_tokens_per_s": statistics.median(plain.rate for plain, _ in rounds),
            "tokens_per_s": statistics.median(with_drafts.rate for _, with_drafts in rounds),
            "ratio": statistics.median(with_drafts.rate / plain.rate for plain, with_drafts in rounds),
            "ratios": [with_drafts.rate / plain.rate for plain, with_drafts in rounds],
            "drafted": drafted,
            "acceptance": accepted / drafted if drafted else None,
            "same": sum(one == other for one, other in pairs) / len(pairs),
        }

    def _request(self, idx: int, asked: Asked) -> Request:
        params = SamplingParams(max_tokens=self._args.new_tokens, temperature=0, constraint=asked.constraint)
        return Request(
            request_id=str(idx),
            prompt_ids=asked.prompt_ids,
            params=params,
            eos_ids=self._eos_ids,
            sink=lambda event: None,
            guide=None if asked.constraint is None else self._compiler.guide(asked.constraint),
        )


def measure(path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each task, and one for all together."""
    artifact = open_artifact(path, allow_failed=args.allow_failed)
    tokenizer = Tokenizer.from_artifact(artifact)
    template = load_chat_template(artifact.listed(TEMPLATE_FILE), tokenizer.config, tokenizer.special_tokens)
    if template is None:
        raise HeadraceError(f"{path} has no chat template; its requests would not be followed")

    def encode(task: Task) -> Asked:
        text = template.render([{"role": "user", "content": task.text}])
        return Asked(tokenizer.encode(text, add_special_tokens=False), task.constraint)

    session = OrtSession.open(artifact, num_slots=NUM_SLOTS, capacity=CAPACITY, threads=args.threads, is_run_exact=True)
    eos_ids, vocab_size = frozenset(artifact.manifest.eos_ids), session.info.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids)
    comparison = Comparison(session, compiler, eos_ids, args)
    rows = []
    with progress_bar("speculation", total=(3 * ALONE + 1) * (args.repeat + 1), unit="round") as bar:
        for kind, tasks in (("copy", COPY), ("nothing to copy", PLAIN), ("held to a form", HELD)):
            for task in tasks[:ALONE]:
                rows.append(comparison.measure(task.name, [encode(task)], bar) | {"kind": kind})
        together = [encode(task) for pair in zip(COPY, PLAIN, strict=True) for task in pair]
        rows.append(comparison.measure("all", together * TURNS, bar) | {"kind": "8 at a time"})
    compiler.close()
    session.close()
    return [row | {"artifact": Path(path).name} for row in rows]


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    target = f">= {TARGETS[row['kind']]}x" if row["kind"] in TARGETS else "-"
    share = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
    print(
        f"{row['artifact']:10}{row['kind']:17}{row['task']:10}{row['plain_tokens_per_s']:8.1f}{row['tokens_per_s']:8.1f}"
        f"{row['ratio']:7.2f}x{target:>11}{share:>10}{row['same']:7.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--allow-failed", action="store_true")
    args = parser.parse_args()
    if args.new_tokens < 2 or args.repeat < 1:
        parser.error("--new-tokens must be at least 2 and --repeat at least 1")
    print(f"{'':37}{'plain':>8}{'drafts':>8}{'ratio':>8}{'target':>11}{'accepted':>10}{'same':>7}")
    rows = []
    for artifact in args.artifacts:
        measured = measure(artifact, args)
        rows += measured
        for row in measured:
            show(row)
    settings = {name: value for name, value in vars(args).items() if name != "artifacts"}
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "speculation", "machine": machine, "settings": settings, "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        sys.exit(f"speculation: {error}")
