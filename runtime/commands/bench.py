"""`headrace bench`: how fast an artifact is on this machine, and how near to what the machine could do.

Prefill and decode are measured on the session alone, latencies and overhead on the whole engine around the same
session. Every round measures each case and the machine's two peaks once, so that a machine that slows down slows all of
them; the figures are medians over the rounds. A table for people, then one JSON line.
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
    from runtime.commands.roofline import Machine, Peaks
    from runtime.session.session import Session
    from runtime.text_model import TextModel

T = TypeVar("T")

CONTEXT = 128
"""Tokens in each row's cache when decoding starts."""
ENGINE_PROMPT = 32
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
    return {**_result(artifact, plan, describe_machine(), rounds, peak), "device": session.info.device}


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
    artifact: "Artifact", plan: Plan, machine: "Machine", rounds: list[Round], peak_bytes: int
) -> dict[str, Any]:
    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

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
        "read_gb_s": median(lambda one: one.peaks.read) / 1e9,
        "gemm_gflop_s": median(lambda one: one.peaks.gemm) / 1e9,
        "prefill": [
            {"tokens": length, "tokens_per_s": length / median(lambda one, length=length: one.prefill_s[length])}  # type: ignore[misc]
            for length in plan.prompts
        ],
        "decode": [_decode_row(artifact, plan, batch, rounds) for batch in plan.batches],
        "engine": [_engine_row(plan, batch, dict(how), list(map(of, rounds))) for batch, how, of in engines],
        "peak_rss_bytes": peak_bytes,
    }


def _decode_row(artifact: "Artifact", plan: Plan, batch: int, rounds: list[Round]) -> dict[str, Any]:
    from runtime.commands.roofline import decode_cost

    context = plan.context + plan.new_tokens // 2  # the mean over the steps
    cost = decode_cost(artifact, batch=batch, context=context)
    num_bytes = cost.weight_bytes + cost.kv_bytes
    step_s = statistics.median(one.step_s[batch] for one in rounds)
    return {
        "batch": batch,
        "context": context,
        "tokens_per_s": batch / step_s,
        "step_ms": step_s * 1e3,
        "bytes": num_bytes,
        "flop": cost.flop,
        "bandwidth_share": statistics.median(num_bytes / one.step_s[batch] / one.peaks.read for one in rounds),
        "compute_share": statistics.median(cost.flop / one.step_s[batch] / one.peaks.gemm for one in rounds),
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
        f"{result['threads']} threads read {result['read_gb_s']:.1f} GB/s and multiply"
        f" {result['gemm_gflop_s']:.0f} GFLOP/s in float32",
        "",
        f"{'session':16}{'tokens/s':>10}{'step ms':>10}{'bandwidth':>11}{'float32 peak':>14}",
        *(f"prefill {row['tokens']:<8}{row['tokens_per_s']:10,.0f}" for row in result["prefill"]),
        *(
            f"decode x{row['batch']:<8}{row['tokens_per_s']:10,.1f}{row['step_ms']:10.1f}"
            f"{row['bandwidth_share']:11.0%}{row['compute_share']:14.0%}"
            for row in result["decode"]
        ),
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


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
