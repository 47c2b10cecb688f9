"""JSON schemas of real projects, with answers that are right and wrong: what compiles, and what is let through?

usage: python -m benchmarks.maskbench DIRECTORY [--sample 500] [--seed 0] [--jobs 2] [--timeout 120]

DIRECTORY holds MaskBench's data, `maskbench/data` of https://github.com/guidance-ai/jsonschemabench: 11,300 files, each
a schema and its tests. --sample 0 takes all of them. For each schema:

    strict        it compiles with `strict`: a grammar holds all of it
    compiled      it compiles without: what no grammar holds is left to the check of the complete answer
    complete      valid answers that the grammar lets through, of all
    sound         wrong answers that the grammar stops or the check finds, of all

The grammar writes properties in the order of the schema and whole numbers without a point, and the data's are put so
where they are not: an answer counts as let through if some order of its properties is. Each schema has a process that
ends after --timeout seconds, since the search for that order may be long. Prints a table, then one JSON line.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from runtime.commands.roofline import describe_machine
from runtime.core import Constraint, ConstraintKind
from runtime.errors import InvalidRequest
from runtime.grammar.grammar import GrammarCompiler
from runtime.grammar.guide import GrammarGuide
from runtime.grammar.schema.check import Outcome, check_answer
from runtime.grammar.schema.translation import translate_schema
from tests.support.byte_tokenizer import byte_tokenizer

EOS_ID, VOCAB_SIZE = 257, 258
MAX_TRIES = 30_000
"""Orders of properties that are tried for one answer."""

PARAM = "schema"
TOKENIZER = byte_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, vocab_size=VOCAB_SIZE, eos_ids=frozenset([EOS_ID]))


class SchemaResult(NamedTuple):
    """What became of one file. problem: why the schema does not compile, None if it does."""

    name: str
    is_strict: bool
    problem: str | None
    num_valid: int = 0
    num_invalid: int = 0
    stopped: tuple[int, ...] = ()
    """Valid answers that are not let through, by their numbers."""
    found: int = 0
    """Wrong answers that the check found."""
    missed: tuple[int, ...] = ()
    """Wrong answers that nothing stopped."""
    blamed: tuple[int, ...] = ()
    """Valid answers that the check does not pass."""


class State(NamedTuple):
    """Text, and a matcher that has taken it."""

    matcher: Any
    text: str


Then = Callable[[State], str | None]


class OrderSearch:
    """Looks for an order of an answer's properties in which a grammar lets it through."""

    def __init__(self, schema: Any, matcher: Any) -> None:
        self._matcher = matcher
        self._ranks: dict[str, int] = {}
        self._rank(schema)
        self._num_tries = 0
        self._is_hasty = True

    def _rank(self, schema: Any) -> None:
        """Names in the order in which the schema declares them, anywhere: where to begin to look."""
        if isinstance(schema, dict):
            properties = schema.get("properties")
            for name in properties if isinstance(properties, dict) else ():
                self._ranks.setdefault(name, len(self._ranks))
        for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            self._rank(item)

    def find(self, answer: Any) -> str | None:
        """The answer's text in such an order; None if there is none, or none within MAX_TRIES."""
        for self._is_hasty in (True, False):
            self._num_tries = 0
            try:
                found = self._write(answer, lambda state: state.text, State(self._matcher.deep_copy(), ""))
            except (RecursionError, TimeoutError):
                continue
            if found is not None:
                return found
        return None

    def _eat(self, state: State, text: str) -> State | None:
        self._num_tries += 1
        if self._num_tries > MAX_TRIES:
            raise TimeoutError
        matcher = state.matcher.deep_copy()
        tokens = list(text.encode())
        return State(matcher, state.text + text) if matcher.try_consume_tokens(tokens) == len(tokens) else None

    def _write(self, value: Any, then: Then, state: State) -> str | None:
        """The text with `value` behind `state`, and what `then` puts behind that."""
        if isinstance(value, dict) and value:
            names = sorted(value, key=lambda name: self._ranks.get(name, len(self._ranks)))
            return self._fields(value, names, "{", then, state)
        if isinstance(value, list) and value:
            return self._items(value, "[", then, state)
        after = self._eat(state, as_json(value))
        return None if after is None else then(after)

    def _fields(self, value: dict[str, Any], names: Sequence[str], before: str, then: Then, state: State) -> str | None:
        if not names:
            after = self._eat(state, "}")
            return None if after is None else then(after)
        starts = {name: self._eat(state, f"{before}{as_json(name)}: ") for name in names}
        possible = {name: start for name, start in starts.items() if start is not None}
        for name, start in possible.items():
            others = [other for other in names if other != name]
            waiting = [other for other in possible if other != name]
            found = self._write(value[name], partial(self._after_field, value, others, waiting, then), start)
            if found is not None:
                return found
        return None

    def _after_field(
        self, value: dict[str, Any], names: Sequence[str], waiting: Sequence[str], then: Then, state: State
    ) -> str | None:
        """The remaining fields. Most often the order was wrong if some that could be written before no longer can."""
        if self._is_hasty and any(self._eat(state, f", {as_json(name)}: ") is None for name in waiting):
            return None
        return self._fields(value, names, ", ", then, state)

    def _items(self, items: Sequence[Any], before: str, then: Then, state: State) -> str | None:
        after = self._eat(state, before if items else "]")
        if after is None or not items:
            return None if after is None else then(after)
        return self._write(items[0], partial(self._items, items[1:], ", ", then), after)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def without_points(value: Any) -> Any:
    """The same JSON value, with whole numbers as integers."""
    if isinstance(value, list):
        return [without_points(item) for item in value]
    if isinstance(value, dict):
        return {name: without_points(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def lets_through(guide: GrammarGuide, text: str) -> bool:
    """Whether a grammar lets a whole answer through, token by token as in the server."""
    try:
        for token_id in TOKENIZER.encode(text, add_special_tokens=False):
            if not guide.allowed()[token_id]:
                return False
            guide.advance(token_id)
        return guide.is_stopped or bool(guide.allowed()[EOS_ID])
    except InvalidRequest:  # too complex to follow
        return False


def compiled(schema: Any, *, is_strict: bool) -> Constraint:
    """The constraint of a schema, known to compile. Raises InvalidRequest."""
    found = translate_schema(schema, param=PARAM, is_strict=is_strict)
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, found.source, PARAM, late_checks=found.late_checks)
    COMPILER.guide(constraint)
    return constraint


def run_file(path: Path) -> SchemaResult:
    """Compile the schema of one file and try its answers."""
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        compiled(data["schema"], is_strict=True)
        is_strict = True
    except InvalidRequest:
        is_strict = False
    try:
        constraint = compiled(data["schema"], is_strict=False)
    except InvalidRequest as refused:
        return SchemaResult(path.name, is_strict, str(refused))
    through, passed = {}, {}
    for number, test in enumerate(data["tests"]):
        through[number] = is_let_through(constraint, test["data"])
        outcomes = [check_answer(check, as_json(test["data"])).outcome for check in constraint.late_checks]
        passed[number] = all(outcome is Outcome.PASSED for outcome in outcomes)
    valid = [number for number, test in enumerate(data["tests"]) if test["valid"]]
    wrong = [number for number, test in enumerate(data["tests"]) if not test["valid"]]
    return SchemaResult(
        path.name,
        is_strict,
        None,
        num_valid=len(valid),
        num_invalid=len(wrong),
        stopped=tuple(number for number in valid if not through[number]),
        found=sum(through[number] and not passed[number] for number in wrong),
        missed=tuple(number for number in wrong if through[number] and passed[number]),
        blamed=tuple(number for number in valid if not passed[number]),
    )


def is_let_through(constraint: Constraint, answer: Any) -> bool:
    """Whether the grammar lets an answer through in some order of its properties."""
    from llguidance import LLMatcher, LLTokenizer

    if lets_through(COMPILER.guide(constraint), as_json(answer)):
        return True
    answer = without_points(answer)
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(constraint.source), log_level=0)
    text = OrderSearch(json.loads(constraint.source), matcher).find(answer)
    return text is not None and lets_through(COMPILER.guide(constraint), text)


def serve_files(connection: Connection) -> None:
    """What a process of the benchmark does: files in, results out."""
    sys.setrecursionlimit(20_000)  # the search goes one deeper with each field
    with suppress(EOFError, OSError):  # the benchmark was ended
        while True:
            connection.send(run_file(connection.recv()))


def results(paths: Sequence[Path], *, num_jobs: int, timeout_s: float) -> Iterator[SchemaResult]:
    """The results, in the order of the files. A file that takes too long, or ends its process, has no result of its
    own."""
    pending = iter(enumerate(paths))
    done: dict[int, SchemaResult] = {}

    def work() -> None:
        process: multiprocessing.process.BaseProcess | None = None
        for number, path in pending:
            if process is None:
                ours, theirs = multiprocessing.Pipe()
                process = multiprocessing.get_context("spawn").Process(target=serve_files, args=(theirs,))
                process.start()
                theirs.close()
            try:
                ours.send(path)
                if not ours.poll(timeout_s):
                    raise TimeoutError
                done[number] = ours.recv()
            except (TimeoutError, EOFError, OSError) as error:
                done[number] = SchemaResult(path.name, False, f"no result: {error!r}")
                process.kill()
                process.join()
                process = None
        if process is not None:
            process.kill()
            process.join()

    with ThreadPoolExecutor(num_jobs) as pool:
        for job in [pool.submit(work) for _ in range(num_jobs)]:
            job.result()
    yield from (done[number] for number in sorted(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sample", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0)
    arguments = parser.parse_args()
    paths = sorted(arguments.directory.glob("*.json"))
    if not paths:
        sys.exit(f"{arguments.directory} has no .json files")
    if 0 < arguments.sample < len(paths):
        paths = random.Random(arguments.seed).sample(paths, arguments.sample)
    started_s = time.monotonic()
    found = list(results(paths, num_jobs=arguments.jobs, timeout_s=arguments.timeout))
    report(found, seconds=time.monotonic() - started_s)


def report(found: Sequence[SchemaResult], *, seconds: float) -> None:
    """Print what fell short, the table, and the JSON line."""
    fine = [result for result in found if result.problem is None]
    num_valid, num_wrong = sum(result.num_valid for result in fine), sum(result.num_invalid for result in fine)
    for result in found:
        if result.problem is not None:
            print(f"{result.name}: {result.problem[:160]}")
        for what in ("stopped", "missed", "blamed"):
            if numbers := getattr(result, what):
                print(f"{result.name}: {what} {', '.join(map(str, numbers))}")
    figures = {
        "strict": (sum(result.is_strict for result in found), len(found)),
        "compiled": (len(fine), len(found)),
        "complete": (num_valid - sum(len(result.stopped) for result in fine), num_valid),
        "sound": (num_wrong - sum(len(result.missed) for result in fine), num_wrong),
        "found_by_check": (sum(result.found for result in fine), num_wrong),
        "blamed_by_check": (sum(len(result.blamed) for result in fine), num_valid),
    }
    for name, (part, whole) in figures.items():
        print(f"{name:16} {part:7,} of {whole:7,}  {part / max(1, whole):8.2%}")
    print(json.dumps({"machine": describe_machine(), "seconds": round(seconds), **figures}))


if __name__ == "__main__":
    main()
