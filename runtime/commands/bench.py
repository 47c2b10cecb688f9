"""`headrace bench`: how fast an artifact is on this machine, and how near to what the machine could do.

Prefill and decode are measured on the session alone, latencies and overhead on the whole engine around the same
session. Every round measures each case and the machine's peaks once, in turn. Figures are medians over the rounds, but
the machine's peaks are the best that any round saw. A table for people, then one JSON line.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from runtime.backends.registry import BACKENDS
from runtime.core import SamplingParams
from runtime.errors import InvalidSetting
from runtime.settings import check_at_least

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.commands.bench_runs import EngineRun, StepTimes
    from runtime.commands.roofline import Machine, Peaks, StepCost
    from runtime.session.session import Session
    from runtime.text_model import TextModel

T = TypeVar("T")

CONTEXT = 128
"""Tokens in each row's cache when decoding starts."""
ENGINE_PROMPT = 32
INTEGER_WEIGHTS = ("w8", "w4", "im")
"""How precisions with integer weights begin; the last is `imported`."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
"""A common choice; top-p is what costs the sampler most."""


class Plan(NamedTuple):
    """What to measure: the flags, checked."""

    batches: list[int]
    prompts: list[int]
    new_tokens: int
    repeat: int
    threads: int | None
    context: int
    device: str = "cpu"

    @property
    def capacity(self) -> int:
        """Tokens a slot must hold."""
        return max(*self.prompts, self.context + self.new_tokens, ENGINE_PROMPT + self.new_tokens)


class Round(NamedTuple):
    """One measurement of everything; seconds."""

    peaks: "Peaks"
    prefill_s: dict[int, float]
    step_s: dict[int, float]
    greedy: "dict[int, EngineRun]"
    sampled: "EngineRun"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace bench", description="Speed and memory of an artifact, and its share of the machine's roofline."
    )
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("--batch", default="1,8,32", metavar="N,N", help="rows decoded together (default: %(default)s)")
    parser.add_argument("--prompt", default="128,512", metavar="N,N", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated a row (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; medians count (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the model, by default one per core")
    names = [backend.name for backend in BACKENDS if "threads" in backend.flags]
    parser.add_argument("--device", default="cpu", choices=names, help="what runs the model (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--allow-failed", action="store_true", help="use an artifact that failed its accuracy gate")
    return parser


def main(argv: list[str]) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    from runtime.artifact.manifest import open_artifact

    batches, prompts = _sizes("--batch", args.batch), _sizes("--prompt", args.prompt)
    for name in ("new_tokens", "repeat", "threads"):
        check_at_least(name, getattr(args, name), 1)
    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed)
    longest = artifact.manifest.dims.max_len
    plan = Plan(batches, prompts, args.new_tokens, args.repeat, args.threads, min(CONTEXT, longest // 2), args.device)
    if plan.capacity > longest:
        raise InvalidSetting(
            f"this needs {plan.capacity:,} tokens a row, the model was exported for {longest:,}: "
            "lower --prompt or --new-tokens"
        )
    result = measure(artifact, plan)
    if not args.json:
        sys.stdout.write(_table(result))
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _sizes(flag: str, text: str) -> list[int]:
    """Positive numbers separated by commas, sorted, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise InvalidSetting(f"{flag} {text!r} is not a list of positive numbers like 1,8,32")
    return sorted({int(part) for part in parts})


def measure(artifact: "Artifact", plan: Plan) -> dict[str, Any]:
    """All figures as a JSON-able dict; speeds in tokens a second, times in milliseconds, sizes in bytes.

    Raises InvalidArtifact without a tokenizer, InvalidSetting if the cache does not fit in memory.
    """
    from runtime.commands.bench_runs import opened, peak_memory, prefill
    from runtime.commands.roofline import describe_machine
    from runtime.machine.progress import progress_bar

    batch, num_cases = max(plan.batches), 2 + len(plan.prompts) + 2 * len(plan.batches)
    with (
        progress_bar("bench", total=batch + len(plan.prompts) + plan.repeat * num_cases) as bar,
        opened(artifact, batch=batch, capacity=plan.capacity, threads=plan.threads, device=plan.device) as (
            session,
            model,
            times,
        ),
    ):
        for length in plan.prompts:  # the first run of a length allocates
            prefill(session, length)
            bar.update(1)
        for slot in range(batch):
            prefill(session, plan.context, slot=slot)
            bar.update(1)
        rounds = [_round(session, model, times, plan, lambda: bar.update(1)) for _ in range(plan.repeat)]
        peak = peak_memory()
    figures = _result(artifact, session.info.dialect, plan, describe_machine(), rounds, peak)
    return {**figures, "device": session.info.device}


def _round(
    session: "Session", model: "TextModel", times: "StepTimes", plan: Plan, on_case: Callable[[], object]
) -> Round:
    from runtime.commands.bench_runs import decode, prefill, run_requests
    from runtime.commands.roofline import measure_peaks

    def counted(value: T) -> T:
        on_case()
        return value

    def engine(batch: int, **how: float) -> "EngineRun":
        params = SamplingParams(max_tokens=plan.new_tokens, ignore_eos=True, seed=0, **how)  # type: ignore[arg-type]
        return counted(run_requests(model, times, batch=batch, prompt=ENGINE_PROMPT, params=params))

    return Round(
        peaks=counted(measure_peaks(plan.threads)),
        prefill_s={length: counted(prefill(session, length)) for length in plan.prompts},
        step_s={batch: counted(decode(session, batch, plan.context, plan.new_tokens)) for batch in plan.batches},
        greedy={batch: engine(batch, temperature=0) for batch in plan.batches},
        sampled=engine(max(plan.batches), **SAMPLED),
    )


def _result(
    artifact: "Artifact", dialect: str, plan: Plan, machine: "Machine", rounds: list[Round], peak_bytes: int
) -> dict[str, Any]:
    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    peaks = _best_peaks(rounds)
    engines: list[tuple[int, Mapping[str, float], Callable[[Round], EngineRun]]] = [
        *((batch, {"temperature": 0}, lambda one, batch=batch: one.greedy[batch]) for batch in plan.batches),
        (max(plan.batches), SAMPLED, lambda one: one.sampled),
    ]
    return {
        "benchmark": "headrace bench",
        "artifact": artifact.manifest.name,
        "precision": artifact.manifest.precision,
        "machine": machine._asdict(),
        "repeat": plan.repeat,
        "threads": rounds[0].peaks.threads,
        "read_gb_s": peaks.read / 1e9,
        "gemm_gflop_s": peaks.gemm / 1e9,
        "int8_gop_s": None if peaks.int8 is None else peaks.int8 / 1e9,
        "prefill": [_prefill_row(artifact, dialect, length, rounds) for length in plan.prompts],
        "decode": [_decode_row(artifact, dialect, plan, batch, rounds) for batch in plan.batches],
        "engine": [_engine_row(plan, batch, dict(how), list(map(of, rounds))) for batch, how, of in engines],
        "peak_rss_bytes": peak_bytes,
    }


def _best_peaks(rounds: list[Round]) -> "Peaks":
    from runtime.commands.roofline import Peaks

    return Peaks.best([one.peaks for one in rounds])


def _prefill_row(artifact: "Artifact", dialect: str, length: int, rounds: list[Round]) -> dict[str, Any]:
    from runtime.commands.roofline import prefill_cost

    seconds = statistics.median(one.prefill_s[length] for one in rounds)
    row = _roofline_row(artifact, prefill_cost(artifact, length, dialect), seconds, _best_peaks(rounds))
    return {"tokens": length, "tokens_per_s": length / seconds, "step_ms": seconds * 1e3, **row}


def _decode_row(artifact: "Artifact", dialect: str, plan: Plan, batch: int, rounds: list[Round]) -> dict[str, Any]:
    from runtime.commands.roofline import decode_cost

    context = plan.context + plan.new_tokens // 2  # the mean over the steps
    step_s = statistics.median(one.step_s[batch] for one in rounds)
    cost = decode_cost(artifact, batch=batch, context=context, dialect=dialect)
    row = _roofline_row(artifact, cost, step_s, _best_peaks(rounds))
    return {"batch": batch, "context": context, "tokens_per_s": batch / step_s, "step_ms": step_s * 1e3, **row}


def _roofline_row(artifact: "Artifact", cost: "StepCost", seconds: float, peaks: "Peaks") -> dict[str, Any]:
    """What a run needs, and which shares of the machine's peaks it reached.

    `roofline_share` is the larger of bytes and operations, each over its peak, in the run's time: 1 is the bound. The
    operations' peak is int8's if the weights are integers and that peak is known, else float32's.
    """
    is_integer = peaks.int8 is not None and artifact.manifest.precision[:2] in INTEGER_WEIGHTS
    peak = peaks.int8 if is_integer and peaks.int8 is not None else peaks.gemm
    return {
        "bytes": cost.num_bytes,
        "flop": cost.flop,
        "bandwidth_share": cost.num_bytes / seconds / peaks.read,
        "compute_share": cost.flop / seconds / peaks.gemm,
        "int8_share": None if peaks.int8 is None else cost.flop / seconds / peaks.int8,
        "roofline_share": max(cost.num_bytes / peaks.read, cost.flop / peak) / seconds,
    }


def _engine_row(plan: Plan, batch: int, how: dict[str, float], runs: "list[EngineRun]") -> dict[str, Any]:
    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    tpot_s = median([run.tpot_s for run in runs])
    return {
        "batch": batch,
        "prompt_tokens": ENGINE_PROMPT,
        "new_tokens": plan.new_tokens,
        "sampling": how,
        "tokens_per_s": batch * plan.new_tokens / statistics.median(run.seconds for run in runs),
        "ttft_ms": statistics.median(run.ttft_s for run in runs) * 1e3,
        "tpot_ms": None if tpot_s is None else tpot_s * 1e3,
        "overhead_share": median([run.overhead_share for run in runs]),
    }


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{result['artifact']}, {result['precision']}, {result['device']}, on {machine['cpu']}"
        f" ({machine['cores']} cores, {machine['instruction_sets'] or 'no instruction set that matters here'})",
        f"{versions}; medians of {result['repeat']}",
        f"{result['threads']} threads read {result['read_gb_s']:.1f} GB/s, multiply"
        f" {result['gemm_gflop_s']:.0f} GFLOP/s in float32 and {_or_dash(result['int8_gop_s'], '.0f')} GOP/s in int8",
        "",
        f"{'session':16}{'tokens/s':>10}{'step ms':>10}{'MB':>8}{'GFLOP':>8}{'bandwidth':>11}{'float32':>9}{'int8':>7}"
        f"{'roofline':>10}",
        *(_phase(f"prefill {row['tokens']}", row) for row in result["prefill"]),
        *(_phase(f"decode x{row['batch']}", row) for row in result["decode"]),
        "",
        f"{'engine':16}{'tokens/s':>10}{'TTFT ms':>10}{'TPOT ms':>11}{'outside model':>15}",
        *(
            f"{'sampled' if row['sampling']['temperature'] else 'greedy':7} x{row['batch']:<7}"
            f"{row['tokens_per_s']:10,.1f}{row['ttft_ms']:10.0f}"
            f"{_or_dash(row['tpot_ms'], '.1f'):>11}{_or_dash(row['overhead_share'], '.1%'):>15}"
            for row in result["engine"]
        ),
        "",
        f"peak memory {result['peak_rss_bytes'] / 1e6:,.0f} MB",
        "",
    ]
    return "\n".join(lines)


def _phase(name: str, row: Mapping[str, Any]) -> str:
    return (
        f"{name:16}{row['tokens_per_s']:10,.1f}{row['step_ms']:10.1f}{row['bytes'] / 1e6:8,.0f}{row['flop'] / 1e9:8.1f}"
        f"{row['bandwidth_share']:11.0%}{row['compute_share']:9.0%}{_or_dash(row['int8_share'], '.0%'):>7}"
        f"{row['roofline_share']:10.0%}"
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
