"""`headrace bench`: how fast an artifact is on this machine, and how near to what the machine could do.

Prefill and decode are measured on the session alone, latencies and overhead on the whole engine. Random token ids: the
work does not depend on them. A table for people, then one JSON line.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from runtime.core import FinishReason, SamplingParams
from runtime.errors import InvalidSetting

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.ort_session import OrtSession
    from runtime.roofline import Machine

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
    for name in ("new_tokens", "repeat"):
        if getattr(args, name) < 1:
            raise InvalidSetting(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    longest = artifact.manifest.dims.max_len
    needed = max(*args.prompt, min(CONTEXT, longest // 2) + args.new_tokens, ENGINE_PROMPT + args.new_tokens)
    if needed > longest:
        raise InvalidSetting(
            f"this needs {needed:,} tokens a row, the model was exported for {longest:,}: ask for less"
        )


def measure(artifact: "Artifact", args: argparse.Namespace) -> dict[str, Any]:
    """All figures as a JSON-able dict; speeds in tokens a second, times in milliseconds, sizes in bytes."""
    from runtime.ort_session import OrtSession
    from runtime.progress import progress_bar
    from runtime.roofline import describe_machine

    machine = describe_machine()
    context = min(CONTEXT, artifact.manifest.dims.max_len // 2)
    capacity = max(*args.prompt, context + args.new_tokens)
    session = OrtSession.open(artifact, num_slots=max(args.batch), capacity=capacity, threads=args.threads)
    with progress_bar("bench", total=args.repeat * (len(args.prompt) + len(args.batch) + 1)) as bar:

        def median(run: Callable[[], float]) -> float:
            seconds = []
            for _ in range(args.repeat):
                seconds.append(run())
                bar.update(1)
            return statistics.median(seconds)

        prefill(session, min(args.prompt))  # the first run allocates
        prefills = [
            {"tokens": length, "tokens_per_s": length / median(lambda length=length: prefill(session, length))}  # type: ignore[misc]
            for length in args.prompt
        ]
        decodes = []
        for batch in args.batch:
            step_s = median(lambda batch=batch: decode(session, batch, context, args.new_tokens))  # type: ignore[misc]
            decodes.append(_decode_row(artifact, machine, batch, context + args.new_tokens // 2, step_s))
        session.close()
        engine = measure_engine(artifact, args, lambda: bar.update(1))
    return {
        "benchmark": "headrace bench",
        "artifact": artifact.manifest.name,
        "precision": artifact.manifest.precision,
        "machine": machine._asdict(),
        "versions": dict(artifact.manifest.versions),
        "prefill": prefills,
        "decode": decodes,
        "engine": engine,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


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
    """Mean seconds of a decode step of `batch` rows, `num_tokens` steps from `context` cached tokens on."""
    import numpy as np

    from runtime.session import Batch

    ids = np.ones((batch, 1), np.int64)
    past, ones, wanted = np.full(batch, context, np.int32), np.ones(batch, np.int32), np.arange(batch)
    started_s = time.perf_counter()
    for _ in range(num_tokens):
        session.run(Batch(0, ids, past, ones, wanted))
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

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        if not num_prefill_tokens:
            self.steps.append((num_decode, step_s, model_s))

    def on_first_token(self, *, ttft_s: float) -> None:
        self.ttft_s.append(ttft_s)

    def on_finish(self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None) -> None:
        if tpot_s is not None:
            self.tpot_s.append(tpot_s)

    def overhead_share(self, batch: int) -> float:
        """Share of the time of full decode steps spent outside the session."""
        full = [(step_s, model_s) for num, step_s, model_s in self.steps if num == batch]
        return 1 - sum(model_s for _, model_s in full) / sum(step_s for step_s, _ in full) if full else 0.0


def measure_engine(artifact: "Artifact", args: argparse.Namespace, on_run: Callable[[], object]) -> dict[str, Any]:
    """Latencies and overhead of `max(--batch)` greedy requests at once, through the engine and its thread."""
    from runtime.settings import EngineSettings
    from runtime.text_model import open_text_model

    batch, capacity = max(args.batch), ENGINE_PROMPT + args.new_tokens
    settings = EngineSettings(max_batch=batch, max_waiting=batch, max_len=capacity, threads=args.threads)
    times = StepTimes()
    model = open_text_model(artifact.path, settings, allow_failed=args.allow_failed, observer=times)
    model.start()
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    seconds = []
    for _ in range(args.repeat):
        started_s = time.perf_counter()
        running = [model.generate(_prompt(row, model.vocab_size), params) for row in range(batch)]
        for generation in running:
            if (last := list(generation)[-1]).finish_reason is not FinishReason.LENGTH:
                raise InvalidSetting(f"the engine ended a request with {last.finish_reason}: {last.error}")
        seconds.append(time.perf_counter() - started_s)
        on_run()
    model.close()
    return {
        "batch": batch,
        "prompt_tokens": ENGINE_PROMPT,
        "new_tokens": args.new_tokens,
        "tokens_per_s": batch * args.new_tokens / statistics.median(seconds),
        "ttft_ms": statistics.median(times.ttft_s) * 1e3,
        "tpot_ms": statistics.median(times.tpot_s) * 1e3 if times.tpot_s else None,
        "overhead_share": times.overhead_share(batch),
    }


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
        f"{'':16}{'tokens/s':>10}{'step ms':>10}{'bandwidth':>11}{'float32 peak':>14}",
    ]
    lines += [f"prefill {row['tokens']:<8}{row['tokens_per_s']:10,.0f}" for row in result["prefill"]]
    lines += [
        f"decode x{row['batch']:<8}{row['tokens_per_s']:10,.1f}{row['step_ms']:10.1f}"
        f"{row['bandwidth_share']:11.0%}{row['compute_share']:14.0%}"
        for row in result["decode"]
    ]
    tpot = "-" if engine["tpot_ms"] is None else f"{engine['tpot_ms']:.1f} ms"
    lines += [
        f"engine x{engine['batch']:<8}{engine['tokens_per_s']:10,.1f}   TTFT {engine['ttft_ms']:.0f} ms, TPOT {tpot},"
        f" {engine['overhead_share']:.1%} of a step outside the model",
        f"peak memory {result['peak_rss_bytes'] / 1e6:,.0f} MB",
        "",
    ]
    return "\n".join(lines)
