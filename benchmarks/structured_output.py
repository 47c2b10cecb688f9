"""Structured output on a real artifact: are answers valid, and what do masks cost?

usage: python -m benchmarks.structured_output ARTIFACT [--repeat 21] [--new-tokens 32] [--max-tokens 1500]

1. The 200 schemas of tests/support/schemas/graded.py, eight requests at a time, sampled at temperature 0.7; each answer
   is parsed and validated by `jsonschema`. Answers cut by --max-tokens are counted apart: they may be fine so far.
2. The time of a decode step of eight rows, free and held to a schema, in turn: A B A B. Rows generate as many tokens
   from the same prompts; medians over the steps of a round, the ratio of neighbouring rounds. The rounds are short, two
   seconds, since a machine that others share changes its pace by more than a mask costs.

Prints a table, then one JSON line. Needs `jsonschema`; a few minutes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator

from runtime.commands.roofline import describe_machine
from runtime.core import Constraint, ConstraintKind, FinishReason, SamplingParams, Usage
from runtime.machine.progress import progress_bar
from runtime.settings import EngineSettings
from runtime.text_model import TextModel, open_text_model
from tests.support.schemas.graded import Graded, graded_schemas

BATCH = 8
MAX_MASK_SHARE = 0.05
ENDLESS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "year": {"type": "integer", "minimum": 1000, "maximum": 2030},
            "tags": {"type": "array", "items": {"enum": ["river", "lake", "sea"]}, "maxItems": 3},
        },
        "required": ["name", "year", "tags"],
        "additionalProperties": False,
    },
}
"""What the rows of the timing are held to: it never ends early, and has free text, numbers and forced parts."""


class Answer(NamedTuple):
    """How one schema went: `problem` is None for a valid answer or one that was cut."""

    graded: Graded
    num_tokens: int
    is_cut: bool
    problem: str | None


class StepTimes:
    """An `EngineObserver` that keeps the times of full decode steps, in seconds."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.models: list[float] = []

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        if num_decode == BATCH and not num_prefill_tokens:
            self.steps.append(step_s)
            self.models.append(model_s)

    def on_first_token(self, *, ttft_s: float) -> None:
        pass

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        pass


def constraint_of(schema: dict[str, Any]) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "schema")


def answer(model: TextModel, graded: Graded, max_tokens: int) -> Answer:
    """Ask for one answer to one schema and judge it."""
    question = f"Answer with JSON that follows this schema: {json.dumps(graded.schema)[:600]}"
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0.7, seed=graded.number, constraint=constraint_of(graded.schema)
    )
    events = list(model.generate(model.encode_chat([{"role": "user", "content": question}]), params))
    num_tokens = sum(event.token_id is not None for event in events)
    last = events[-1]
    if last.finish_reason is FinishReason.LENGTH:
        return Answer(graded, num_tokens, True, None)
    if last.finish_reason is not FinishReason.STOP:
        return Answer(graded, num_tokens, False, last.error or str(last.finish_reason))
    text = "".join(event.text for event in events)
    try:
        errors = [error.message for error in Draft202012Validator(graded.schema).iter_errors(json.loads(text))]
    except ValueError as error:
        errors = [f"not JSON: {error}"]
    return Answer(graded, num_tokens, False, f"{errors[0]}: {text[:200]}" if errors else None)


def answer_all(model: TextModel, max_tokens: int) -> list[Answer]:
    schemas = graded_schemas()
    with ThreadPoolExecutor(BATCH) as pool, progress_bar("schemas", total=len(schemas), unit="schema") as bar:

        def one(graded: Graded) -> Answer:
            found = answer(model, graded, max_tokens)
            bar.update(1)
            return found

        return list(pool.map(one, schemas))


def run_round(model: TextModel, times: StepTimes, *, constraint: Constraint | None, new_tokens: int) -> list[float]:
    """Median seconds of a full decode step and of the model in it."""
    times.steps.clear()
    times.models.clear()
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, constraint=constraint)
    ids = model.encode_chat([{"role": "user", "content": "List rivers, lakes and seas with a year as JSON."}])
    generations = [model.generate(ids, params) for _ in range(BATCH)]
    for generation in generations:
        assert sum(event.token_id is not None for event in generation) == new_tokens
    return [statistics.median(times.steps), statistics.median(times.models)]


def mask_cost(model: TextModel, times: StepTimes, *, repeat: int, new_tokens: int) -> dict[str, Any]:
    """Free and held rounds in turn; the share of a step that the constraint adds."""
    held = constraint_of(ENDLESS)
    for constraint in (None, held):  # the first round allocates and compiles
        run_round(model, times, constraint=constraint, new_tokens=new_tokens)
    rounds = [
        [run_round(model, times, constraint=constraint, new_tokens=new_tokens) for constraint in (None, held)]
        for _ in range(repeat)
    ]
    ratios = [held_step / free_step for (free_step, _), (held_step, _) in rounds]
    outside = [(held_step - held_model) / held_step for _, (held_step, held_model) in rounds]
    outside_free = [(free_step - free_model) / free_step for (free_step, free_model), _ in rounds]
    return {
        "free_step_ms": 1000 * statistics.median(free_step for (free_step, _), _ in rounds),
        "held_step_ms": 1000 * statistics.median(held_step for _, (held_step, _) in rounds),
        "step_ratio": statistics.median(ratios),
        "step_ratio_range": [min(ratios), max(ratios)],
        "outside_model_free": statistics.median(outside_free),
        "outside_model_held": statistics.median(outside),
    }


def by_level(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
    levels: dict[int, list[Answer]] = {}
    for item in answers:
        levels.setdefault(item.graded.level, []).append(item)
    return levels


def print_answers(answers: Sequence[Answer]) -> None:
    print(f"{'level':>5}{'schemas':>9}{'valid':>7}{'cut':>5}{'invalid':>9}{'tokens':>8}")
    for level, items in by_level(answers).items():
        cut, bad = sum(item.is_cut for item in items), sum(item.problem is not None for item in items)
        tokens = sum(item.num_tokens for item in items)
        print(f"{level:5}{len(items):9}{len(items) - cut - bad:7}{cut:5}{bad:9}{tokens:8}")
    for item in answers:
        if item.problem is not None:
            print(f"  level {item.graded.level}, number {item.graded.number}: {item.problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=1500)
    args = parser.parse_args()
    times = StepTimes()
    model = open_text_model(args.artifact, EngineSettings(max_batch=BATCH, max_len=2048), observer=times)
    model.start()
    try:
        cost = mask_cost(model, times, repeat=args.repeat, new_tokens=args.new_tokens)
        started_s = time.perf_counter()
        answers = answer_all(model, args.max_tokens)
        seconds = time.perf_counter() - started_s
    finally:
        model.close()
    print_answers(answers)
    low, high = cost["step_ratio_range"]
    print(
        f"step of {BATCH} rows: free {cost['free_step_ms']:.1f} ms, held {cost['held_step_ms']:.1f} ms; "
        f"ratio {cost['step_ratio']:.3f} ({low:.3f} to {high:.3f}), wanted at most {1 + MAX_MASK_SHARE:.2f}; "
        f"outside the model {cost['outside_model_free']:.1%} free, {cost['outside_model_held']:.1%} held"
    )
    num_cut, num_bad = sum(item.is_cut for item in answers), sum(item.problem is not None for item in answers)
    figures = {
        "artifact": args.artifact,
        "schemas": len(answers),
        "valid": len(answers) - num_cut - num_bad,
        "cut": num_cut,
        "invalid": num_bad,
        "seconds": seconds,
        **cost,
        "machine": describe_machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
