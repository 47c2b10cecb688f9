"""PRECISION=auto: export every candidate precision, measure those that pass their gate, keep the fastest.

The measurements go round the candidates in turn, so that a machine that slows down slows all of them. What was measured
stays in the artifact as choice.json. How speed is measured is the caller's: nothing here takes a time.
"""

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from export.artifact.writer import file_entry, staged, write_json, write_manifest
from export.pipeline.export_model import ExportOptions, export_model
from export.pipeline.speed import Speed, Workload, measure_speed
from export.schemes.registry import AUTO, IMPORTED, SCHEMES
from export.verify.references import check_reference
from runtime.artifact.manifest import CHOICE, Artifact
from runtime.commands.roofline import describe_machine
from runtime.errors import GateFailed, InvalidSetting, UnsupportedModel
from runtime.machine.progress import progress_bar

WORKLOADS = {
    # One person waits for one answer: a page of context, a paragraph of reply.
    "latency": Workload(rows=1, prompt_len=512, new_tokens=128),
    # A full batch of short chats; 32 is the server's default --max-batch.
    "throughput": Workload(rows=32, prompt_len=128, new_tokens=128),
}

ROUNDS = 3
"""Measurements of each candidate: the median of three survives one disturbance."""

Measure = Callable[[Artifact, Workload], Speed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One precision: either measured (seconds for the work, tokens a second, bytes on disk) or out, and why."""

    precision: str
    why_not: str | None = None
    seconds: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    file_bytes: int | None = None
    perplexity_increase: float | None = None


def candidate_precisions(stored_bits: int | None) -> list[str]:
    """What is tried: all that can be exported, and a quantized checkpoint's own integers.

    fp16 is left out: it is for GPUs, and a CPU widens it to what fp32 is.
    """
    names = [name for name, scheme in SCHEMES.items() if scheme.ort is not None and scheme.ort.compute != "float16"]
    return names + ([IMPORTED] if stored_bits is not None else [])


def export_fastest(options: ExportOptions, profile: str, *, measure: Measure = measure_speed) -> Artifact:
    """Export the candidate that does the profile's work in the least time and passes its gate, with the table.

    The artifact appears at `options.out` as with any precision. GateFailed, with every candidate's reason, if none
    passes. All candidates are on disk beside `options.out` at once, until one is chosen.
    """
    if options.force:
        raise InvalidSetting(f"--force contradicts --precision {AUTO}, which wants one that passes; name a precision")
    check_reference(options.verify)
    checkpoint = options.open()
    names = candidate_precisions(checkpoint.stored_bits)
    options.check_target()
    with staged(options.out, check=options.check_target) as staging:
        shelf = staging / "candidates"
        shelf.mkdir()
        artifacts, rejected = _export_all(options, names, shelf)
        if not artifacts:
            raise GateFailed("no precision passes: " + "; ".join(f"{out.precision}: {out.why_not}" for out in rejected))
        work = WORKLOADS[profile].fitted(artifacts[0].manifest.dims.max_len)
        measured = _measure_all(artifacts, work, measure)
        fastest = min(range(len(artifacts)), key=lambda idx: measured[idx].seconds or 0.0)
        chosen = artifacts[fastest]
        for file in chosen.path.iterdir():
            file.rename(staging / file.name)
        shutil.rmtree(shelf)
        table = sorted(measured, key=lambda row: row.seconds or 0.0) + rejected
        write_json(staging / CHOICE, _as_json(profile, work, table))
        manifest = replace(chosen.manifest, files={**chosen.manifest.files, CHOICE: file_entry(staging / CHOICE)})
        write_manifest(staging, manifest)
    return Artifact(options.out, manifest, chosen.receipt)


def _export_all(options: ExportOptions, names: Sequence[str], shelf: Path) -> tuple[list[Artifact], list[Candidate]]:
    """Those that pass their gate, each in a directory called as its precision, and why the others do not."""
    artifacts, rejected = [], []
    for name in names:
        try:
            artifacts.append(export_model(replace(options, precision=name, out=shelf / name, replaces=False)))
        except (GateFailed, UnsupportedModel, InvalidSetting) as error:
            if name == names[0] and not isinstance(error, GateFailed):
                raise  # the first, float32, asks for nothing special: the model or a flag is at fault
            rejected.append(Candidate(precision=name, why_not=str(error)))
    return artifacts, rejected


def _measure_all(artifacts: Sequence[Artifact], work: Workload, measure: Measure) -> list[Candidate]:
    speeds: list[list[Speed]] = [[] for _ in artifacts]
    with progress_bar("measure", total=ROUNDS * len(artifacts), unit="run") as bar:
        for _ in range(ROUNDS):
            for idx, artifact in enumerate(artifacts):
                speeds[idx].append(measure(artifact, work))
                bar.update(1)
    return [_candidate(artifact, runs, work) for artifact, runs in zip(artifacts, speeds, strict=True)]


def _candidate(artifact: Artifact, runs: Sequence[Speed], work: Workload) -> Candidate:
    middle = Speed(statistics.median(run.prefill_s for run in runs), statistics.median(run.step_s for run in runs))
    increase = artifact.receipt.get("figures", {}).get("perplexity_increase")
    return Candidate(
        precision=artifact.path.name,
        seconds=statistics.median(run.seconds(work) for run in runs),
        prefill_tokens_per_s=work.prompt_len / middle.prefill_s,
        decode_tokens_per_s=work.rows / middle.step_s,
        file_bytes=sum(entry.size for entry in artifact.manifest.files.values()),
        perplexity_increase=increase if isinstance(increase, float) else None,
    )


def _as_json(profile: str, work: Workload, table: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "optimized_for": profile,
        "work": work.describe(),
        "rounds": ROUNDS,
        "chosen": table[0].precision,
        "candidates": [asdict(row) for row in table],
        "machine": describe_machine()._asdict(),
    }
