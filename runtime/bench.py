"""`headrace bench`: how fast an artifact is on this machine, and how near to what the machine could do.

Prefill and decode are measured on the session alone, in turn (A B A B), so that a slow minute of the machine falls on
all of them; latencies and overhead on the whole engine, greedy. Made-up token ids: the work does not depend on them. A
table for people, then one JSON line.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runtime.core import FinishReason, SamplingParams
from runtime.errors import EngineFailed, InvalidArtifact, InvalidSetting

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.ort_session import OrtSession
    from runtime.roofline import Machine
    from runtime.text_model import TextModel

CONTEXT = 128  # tokens in each row's cache when decoding is measured
ENGINE_PROMPT = 32


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace bench", description="Speed and memory of an artifact, and its share of the machine's roofline."
    )
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("--batch", type=_sizes, default=[1, 8, 32], metavar="N,N", help="decode batch sizes (1,8,32)")
    parser.add_argument("--prompt", type=_sizes, default=[128, 512], metavar="N,N", help="prompt lengths (128,512)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated a row (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the model, by default one per core")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--allow-failed", action="store_true", help="use an artifact that failed its accuracy gate")
    return parser


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def main(argv: list[str]) -> int:
    """Measure and print."""
    args = _parser().parse_args(argv)
    from runtime.artifact import open_artifact

    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed)
    _check(args, artifact)
    result = measure(artifact, args)
    if not args.json:
        sys.stdout.write(_table(result))
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _check(args: argparse.Namespace, artifact: "Artifact") -> None:
    # The first token of a request comes from its prefill: decoding, and TPOT, begin with the second.
    for name, least in (("new_tokens", 2), ("repeat", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InvalidSetting(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if "tokenizer.json" not in artifact.manifest.files:
        raise InvalidArtifact(
            f"{artifact.path} has no tokenizer.json, without which the engine cannot run; "
            "export a checkpoint that has a tokenizer"
        )
    longest = artifact.manifest.dims.max_len
    needed = max(*args.prompt, min(CONTEXT, longest // 2) + args.new_tokens, ENGINE_PROMPT + args.new_tokens)
    if needed > longest:
        raise InvalidSetting(
            f"this needs {needed:,} tokens a row, the model was exported for {longest:,}: ask for less"
        )


def measure(artifact: "Artifact", args: argparse.Namespace) -> dict[str, Any]:
    """All figures as a JSON-able dict; speeds in tokens a second, times in milliseconds, sizes in bytes."""
    import numpy
    import onnxruntime

    from runtime.ort_session import OrtSession
    from runtime.progress import progress_bar
    from runtime.roofline import describe_machine

    machine = describe_machine(args.threads)
    context = min(CONTEXT, artifact.manifest.dims.max_len // 2)
    capacity = max(*args.prompt, context + args.new_tokens)
    num_runs = len(args.prompt) + len(args.batch)
    with progress_bar("bench", total=(args.repeat + 1) * (num_runs + 1)) as bar:
        session = OrtSession.open(artifact, num_slots=max(args.batch), capacity=capacity, threads=args.threads)
        runs: list[Callable[[], float]] = [partial(prefill, session, length) for length in args.prompt]
        runs += [partial(decode, session, batch, context, args.new_tokens) for batch in args.batch]
        fill_cache(session, context)
        seconds = interleaved(runs, args.repeat, lambda: bar.update(1))
        session.close()
        engine = measure_engine(artifact, args, lambda: bar.update(1))
    prefill_s, decode_s = seconds[: len(args.prompt)], seconds[len(args.prompt) :]
    return {
        "benchmark": "headrace bench",
        "artifact": artifact.manifest.name,
        "precision": artifact.manifest.precision,
        "machine": machine._asdict(),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "numpy": numpy.__version__,
        },
        "exported_with": dict(artifact.manifest.versions),
        "threads": args.threads or machine.cores,
        "prefill": [
            {"tokens": length, "tokens_per_s": length / run_s}
            for length, run_s in zip(args.prompt, prefill_s, strict=True)
        ],
        "decode": [
            _decode_row(artifact, machine, batch, context + args.new_tokens // 2, step_s)
            for batch, step_s in zip(args.batch, decode_s, strict=True)
        ],
        "engine": engine,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def interleaved(
    runs: Sequence[Callable[[], float]], repeat: int, on_run: Callable[[], object] = lambda: None
) -> list[float]:
    """Medians of what the runs return, each run `repeat` times in turn: A B A B. A first round warms up."""
    results: list[list[float]] = [[] for _ in runs]
    for turn in range(repeat + 1):
        for run, kept in zip(runs, results, strict=True):
            value = run()
            if turn:
                kept.append(value)
            on_run()
    return [statistics.median(kept) for kept in results]


def fill_cache(session: "OrtSession", context: int) -> None:
    """Put `context` real tokens into every slot. Memory never written may all be one page of zeros, quick to read."""
    prefill(session, context)
    for slot in range(1, session.info.num_slots):
        session.copy_slot(0, slot, context)


def prefill(session: "OrtSession", length: int) -> float:
    """Seconds to run one prompt of `length` tokens and get its last logits."""
    import numpy as np

    from runtime.session import Batch

    ids = np.arange(length, dtype=np.int64)[None] % session.info.vocab_size
    batch = Batch(0, ids, np.zeros(1, np.int32), np.full(1, length, np.int32), np.array([length - 1]))
    started_s = time.perf_counter()
    session.run(batch)
    return time.perf_counter() - started_s


def decode(session: "OrtSession", batch: int, context: int, num_tokens: int) -> float:
    """Mean seconds of a greedy decode step of `batch` rows, `num_tokens` steps from `context` cached tokens on.

    Choosing the token counts: a step without it generates nothing. The slots are filled (`fill_cache`) before.
    """
    import numpy as np

    from runtime.session import Batch

    ids = np.ones((batch, 1), np.int64)
    past, ones, wanted = np.full(batch, context, np.int32), np.ones(batch, np.int32), np.arange(batch)
    started_s = time.perf_counter()
    for _ in range(num_tokens):
        logits = session.run(Batch(0, ids, past, ones, wanted))
        ids[:, 0] = logits.argmax(-1)
        past += 1
    return (time.perf_counter() - started_s) / num_tokens


def _decode_row(artifact: "Artifact", machine: "Machine", batch: int, context: int, step_s: float) -> dict[str, Any]:
    from runtime.roofline import decode_cost

    cost = decode_cost(artifact, batch=batch, context=context)
    num_bytes = cost.weight_bytes + cost.kv_bytes
    return {
        "batch": batch,
        "tokens_per_s": batch / step_s,
        "step_ms": step_s * 1e3,
        "bytes": num_bytes,
        "bandwidth_share": num_bytes / step_s / (machine.read_gb_s * 1e9),
        "compute_share": cost.flop / step_s / (machine.gemm_gflop_s * 1e9),
    }


class StepTimes:
    """An EngineObserver that keeps what it hears."""

    def __init__(self) -> None:
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        self.steps: list[tuple[int, float, float]] = []

    def clear(self) -> None:
        """Forget what was heard."""
        for kept in (self.ttft_s, self.tpot_s, self.steps):
            kept.clear()

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        if not num_prefill_tokens:
            self.steps.append((num_decode, step_s, model_s))

    def on_first_token(self, *, ttft_s: float) -> None:
        self.ttft_s.append(ttft_s)

    def on_finish(self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None) -> None:
        if tpot_s is not None:
            self.tpot_s.append(tpot_s)

    def overhead_share(self, batch: int) -> float | None:
        """Share of the time of decode steps of `batch` rows spent outside the session; None if there was none."""
        full = [(step_s, model_s) for num, step_s, model_s in self.steps if num == batch]
        return 1 - sum(model_s for _, model_s in full) / sum(step_s for step_s, _ in full) if full else None


def measure_engine(artifact: "Artifact", args: argparse.Namespace, on_run: Callable[[], object]) -> dict[str, Any]:
    """Latencies and overhead of `max(--batch)` greedy requests at once, through the engine and its thread."""
    from runtime.settings import EngineSettings
    from runtime.text_model import open_text_model

    batch, capacity = max(args.batch), ENGINE_PROMPT + args.new_tokens
    settings = EngineSettings(max_batch=batch, max_waiting=batch, max_len=capacity, threads=args.threads)
    times = StepTimes()
    model = open_text_model(artifact.path, settings, allow_failed=args.allow_failed, observer=times)
    num_slots = model.stats().num_slots
    if num_slots < batch:
        model.close()
        raise InvalidSetting(f"only {num_slots} of the {batch} slots of --batch fit in memory: ask for {num_slots}")
    model.start()
    seconds = []
    try:
        for turn in range(args.repeat + 1):
            started_s = time.perf_counter()
            _generate_all(model, batch, args.new_tokens)
            seconds.append(time.perf_counter() - started_s)
            if not turn:  # the first turn warms up
                times.clear()
                seconds.clear()
            on_run()
    finally:
        model.close()
    return {
        "batch": batch,
        "prompt_tokens": ENGINE_PROMPT,
        "new_tokens": args.new_tokens,
        "tokens_per_s": batch * args.new_tokens / statistics.median(seconds),
        "ttft_ms": statistics.median(times.ttft_s) * 1e3,
        "tpot_ms": statistics.median(times.tpot_s) * 1e3,
        "overhead_share": times.overhead_share(batch),
    }


def _generate_all(model: "TextModel", batch: int, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    for generation in [model.generate(_prompt(row, model.vocab_size), params) for row in range(batch)]:
        if (last := list(generation)[-1]).finish_reason is not FinishReason.LENGTH:
            raise EngineFailed(f"the engine ended a request with {last.finish_reason}: {last.error}")


def _prompt(row: int, vocab_size: int) -> Sequence[int]:
    """Ids that differ from row to row, so that no two requests are alike."""
    return [(7 + 13 * row + 31 * idx) % vocab_size for idx in range(ENGINE_PROMPT)]


def _table(result: dict[str, Any]) -> str:
    machine, engine = result["machine"], result["engine"]
    lines = [
        f"{result['artifact']}, {result['precision']}, on {machine['cpu']} ({machine['cores']} cores,"
        f" {machine['instruction_sets']}), reads {machine['read_gb_s']:.1f} GB/s,"
        f" multiplies {machine['gemm_gflop_s']:.0f} GFLOP/s in float32",
        "",
        f"{'':16}{'tokens/s':>10}{'step ms':>10}{'bandwidth':>11}{'float32 peak':>14}  nearer",
    ]
    lines += [f"prefill {row['tokens']:<8}{row['tokens_per_s']:10,.0f}" for row in result["prefill"]]
    lines += [
        f"decode x{row['batch']:<8}{row['tokens_per_s']:10,.1f}{row['step_ms']:10.1f}"
        f"{row['bandwidth_share']:11.0%}{row['compute_share']:14.0%}"
        f"  {'bandwidth' if row['bandwidth_share'] > row['compute_share'] else 'compute'}"
        for row in result["decode"]
    ]
    overhead = engine["overhead_share"]
    lines += [
        f"engine x{engine['batch']:<8}{engine['tokens_per_s']:10,.1f}   TTFT {engine['ttft_ms']:.0f} ms,"
        f" TPOT {engine['tpot_ms']:.1f} ms, "
        + ("no step with all rows" if overhead is None else f"{overhead:.1%} of a step outside the model"),
        f"peak memory {result['peak_rss_bytes'] / 1e6:,.0f} MB",
        "",
    ]
    return "\n".join(lines)
