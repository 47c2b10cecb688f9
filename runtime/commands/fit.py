"""`headrace fit`: how long a context and how many requests together fit a given memory, with the sums.

The sums are the server's own (runtime/machine/memory.py): weights first, then a share of what is left for KV slots. The
artifact's own rows count its files; rows of other precisions are the manifest's estimates, made at the export. Loads no
model.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from runtime.artifact.manifest import TRT_WEIGHTS, WEIGHTS, Artifact, Estimate, ModelDims, kind_of, open_artifact
from runtime.artifact.plan_files import largest_plan
from runtime.errors import InvalidSetting
from runtime.machine.memory import DEVICE_FREE_FRACTION, FREE_FRACTION, fitting_slots, kv_budget
from runtime.machine.sizes import format_bytes
from runtime.settings import check_at_least, parse_bytes

CONTEXTS = (1024, 2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True)
class Row:
    """What one precision leaves for the KV cache; `slots` is by their length in tokens."""

    runtime: str
    precision: str
    is_estimate: bool
    weight_bytes: int
    buffer_bytes: int
    kv_dtype: str
    token_bytes: int
    kv_budget: int
    slots: dict[int, int]

    @property
    def fits(self) -> bool:
        return any(count > 0 for count in self.slots.values())


def rows(artifact: Artifact, memory: int, max_batch: int) -> list[Row]:
    """The artifact's dialects as they are, then other precisions of the same dialects."""
    manifest = artifact.manifest
    has_standard = any(kind_of(name) == "trt" for name in manifest.dialects)
    dialects = ["ort"] * ("ort" in manifest.dialects) + ["trt"] * has_standard
    found = []
    for dialect in dialects:
        size = Estimate(weights=_file_bytes(artifact, dialect), kv=manifest.kv_of(dialect).dtype)
        found.append(_row(artifact, dialect, manifest.precision, size, memory, max_batch, is_estimate=False))
    for dialect in dialects:
        for precision, estimate in manifest.estimates.get(dialect, {}).items():
            if precision != manifest.precision:
                found.append(_row(artifact, dialect, precision, estimate, memory, max_batch, is_estimate=True))
    return found


def _row(
    artifact: Artifact, dialect: str, precision: str, size: Estimate, memory: int, max_batch: int, *, is_estimate: bool
) -> Row:
    dims = artifact.manifest.dims
    token_bytes = dims.kv_bytes_per_token(size.kv)
    # Logits of every row; on a GPU once more in pinned memory, which a Jetson takes from the same chips.
    buffer_bytes = max_batch * dims.vocab_size * 4 * (2 if dialect == "trt" else 1)
    fraction = DEVICE_FREE_FRACTION if dialect == "trt" else FREE_FRACTION
    budget = kv_budget(memory - size.weights - buffer_bytes, fraction)
    slots = {
        length: fitting_slots(
            max_batch=max_batch,
            capacity=length,
            bytes_per_token=token_bytes,
            budget=budget,
            state_bytes=artifact.manifest.state_bytes,
        )
        for length in _contexts(dims)
    }
    return Row(dialect, precision, is_estimate, size.weights, buffer_bytes, size.kv, token_bytes, budget, slots)


def _contexts(dims: ModelDims) -> list[int]:
    """The usual lengths within the artifact's limit, and that limit."""
    return sorted({*(length for length in CONTEXTS if length < dims.max_len), dims.max_len})


def _file_bytes(artifact: Artifact, dialect: str) -> int:
    """What the dialect reads: for TensorRT its largest plan, before one is built the weight files."""
    files = artifact.manifest.files
    if dialect == "trt":
        plan_bytes = largest_plan(artifact)
        if plan_bytes is not None:
            return plan_bytes
    names = (WEIGHTS,) if dialect == "ort" else (TRT_WEIGHTS,) if TRT_WEIGHTS in files else (WEIGHTS,)
    return sum(files[name].size for name in names if name in files)


def lines(artifact: Artifact, memory: int, max_batch: int) -> Iterator[str]:
    """The table, and the flags that serve the longest context that fits."""
    found = rows(artifact, memory, max_batch)
    lengths = list(found[0].slots)
    yield f"{artifact.manifest.name} in {format_bytes(memory)}, at most {max_batch} requests together"
    yield ""
    head = "".join(f"{f'{length:,}':>8}" for length in lengths)
    columns = "".join(f"{name:>10}" for name in ("weights", "logits", "KV", "a token", "for KV"))
    yield f"{'runtime':9}{'precision':11}{columns}  slots of{head}"
    for row in found:
        weights = f"{'~' if row.is_estimate else ''}{format_bytes(row.weight_bytes)}"
        counts = "".join(f"{count:8}" for count in row.slots.values())
        yield (
            f"{row.runtime:9}{row.precision:11}{weights:>10}{format_bytes(row.buffer_bytes):>10}{row.kv_dtype:>10}"
            f"{format_bytes(row.token_bytes):>10}{format_bytes(row.kv_budget):>10}          {counts}"
        )
    yield ""
    yield (
        f"for KV = (memory - weights - logits) x {FREE_FRACTION} (ort) or x {DEVICE_FREE_FRACTION} (trt); "
        "a slot takes its tokens x bytes a token; ~ is an estimate for another export"
    )
    best = best_row(found)
    if best is not None:
        length = max(length for length, count in best.slots.items() if count > 0)
        yield (
            f"fits: {best.precision} on {best.runtime}, --max-len {length} --max-batch {best.slots[length]} "
            f"--kv-memory {best.slots[length] * length * best.token_bytes}"
        )


def best_row(found: list[Row]) -> Row | None:
    """The artifact as it is, if it fits; else the widest other precision that does."""
    return next((row for row in sorted(found, key=lambda row: row.is_estimate) if row.fits), None)


def main(argv: list[str]) -> int:
    """Print what fits. InvalidSetting, with the sums, if nothing does."""
    parser = argparse.ArgumentParser(prog="headrace fit", description="What of an artifact fits a device's memory.")
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("--memory", type=parse_bytes, required=True, metavar="SIZE", help="free memory, like 8GB")
    parser.add_argument("--max-batch", type=int, default=32, help="most requests together (default: 32)")
    parser.add_argument("--allow-failed", action="store_true", help="use an artifact that failed its accuracy gate")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    check_at_least("max_batch", args.max_batch, 1)
    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed, check_hashes=False)
    found = rows(artifact, args.memory, args.max_batch)
    if best_row(found) is None:
        least = min(found, key=lambda row: row.weight_bytes + row.buffer_bytes)
        raise InvalidSetting(
            f"{artifact.manifest.name} does not fit {format_bytes(args.memory)} in any precision: {least.precision} "
            f"has {format_bytes(least.weight_bytes)} of weights and {format_bytes(least.buffer_bytes)} of logits, "
            f"which leaves {format_bytes(least.kv_budget)} for slots of "
            f"{format_bytes(min(least.slots) * least.token_bytes)}; lower --max-batch, or take a smaller model"
        )
    if args.json:
        entries: list[dict[str, Any]] = [{**asdict(row), "fits": row.fits} for row in found]
        sys.stdout.write(json.dumps({"memory": args.memory, "rows": entries}, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines(artifact, args.memory, args.max_batch))
    return 0
