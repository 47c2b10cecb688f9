"""Peak memory of calibrated exports: 16 samples against 512, and a model over 2 GB, each against what was predicted.

usage: python benchmarks/calibration_memory.py [--part samples,large] [--precision w8a8] [--gigabytes 2.2]

`samples`: the default model; the statistics of 512 sequences may not take more than those of 16. `large`: a random
checkpoint of this size, calibrated on few short sequences (more would only take longer). Each export is a process of
its own, whose high-water mark the operating system tells; it may fail its gate, as random weights do. Prints a table
and one JSON line; exits with 1 if memory grows by more than a tenth, or a prediction is off by more than a fifth.
On two cores `samples` takes 15 minutes, `large` 30, and free disk of four times the size asked for.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.export_memory import Shape, peak_of_export, write_random
from export.model.families.architectures import parse_config
from export.pipeline.memory_plan import phases
from export.schemes.registry import scheme_named
from export.sources.open import open_checkpoint
from runtime.commands.roofline import describe_machine

MAY_GROW, MAY_MISS = 1.1, 0.2
FEW, MANY, LENGTH = 16, 512, 512
LARGE_SAMPLES, LARGE_LENGTH = 4, 64


def measure(model: str, out: Path, precision: str, num_samples: int, length: int) -> dict[str, Any]:
    """Peak and prediction in bytes of one export."""
    scheme = scheme_named(precision)
    if scheme.calibration is None:
        raise SystemExit(f"calibration_memory: {precision} is not calibrated")
    config = parse_config(open_checkpoint(model).config)
    predicted = max(phases(config, scheme, num_samples=num_samples, length=length), key=lambda phase: phase.size)
    flags = ["--precision", precision, "--force", "--calib-samples", str(num_samples), "--calib-length", str(length)]
    peak = peak_of_export(model, out, flags)
    row = {
        "model": Path(model).name, "precision": precision, "samples": num_samples, "length": length, "peak": peak,
        "predicted": predicted.size, "phase": predicted.name, "predicted_over_peak": predicted.size / peak,
    }  # fmt: skip
    print(
        f"{row['model']:24}{precision:8}{num_samples:9}{length:8}{peak / 1e6:10,.0f}{predicted.size / 1e6:12,.0f}"
        f"{row['predicted_over_peak']:8.2f}   {predicted.name}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="samples,large", help="default: %(default)s")
    parser.add_argument("--precision", default="w8a8", help="default: %(default)s")
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of the large model; default: %(default)s")
    args = parser.parse_args()
    parts = args.part.split(",")
    if not set(parts) <= {"samples", "large"}:
        parser.error("--part takes samples, large or both")
    print(f"{'model':24}{'':8}{'samples':>9}{'tokens':>8}{'peak MB':>10}{'predicted':>12}{'ratio':>8}")
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "artifact"
        if "samples" in parts:
            few, many = (measure("smollm2-135m-instruct", out, args.precision, count, LENGTH) for count in (FEW, MANY))
            rows += [few, many]
            if many["peak"] > MAY_GROW * few["peak"]:
                failures.append(f"{MANY} samples take {many['peak'] / few['peak']:.2f} times the memory of {FEW}")
        if "large" in parts:
            checkpoint = Path(scratch) / "random"
            checkpoint.mkdir()
            write_random(checkpoint, Shape.of_size(args.gigabytes))
            rows.append(measure(str(checkpoint), out, args.precision, LARGE_SAMPLES, LARGE_LENGTH))
    failures += [
        f"{row['model']}: predicted {row['predicted_over_peak']:.2f} times what was seen"
        for row in rows
        if abs(row["predicted_over_peak"] - 1) > MAY_MISS
    ]
    print(json.dumps({"benchmark": "calibration_memory", "machine": describe_machine()._asdict(), "rows": rows}))
    if failures:
        sys.exit("calibration_memory: " + "; ".join(failures))


if __name__ == "__main__":
    main()
