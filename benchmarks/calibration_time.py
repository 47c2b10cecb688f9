"""Seconds of each phase and peak memory of calibrated exports of a random model with the shape of Llama-3.2-1B.

usage: python -m benchmarks.calibration_time [--precision w8a8,w4a16] [--layers 16] [--samples N] [MODEL]

Makes the model (bf16 safetensors, tied embeddings), unless MODEL names one, and exports it in each precision in a
process of its own. The phases are those of the export's progress bars, each from the first sign of its bar to the next
bar's; a bar appears after a second. CPU seconds are those of all threads. Prints a table and one JSON line; exits with
1 where an export takes longer than 25 minutes or more than 4 GB. An export may fail its gate, as random weights do.
Needs 10 GB of disk.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.export_memory import Shape, write_random
from runtime.commands.roofline import describe_machine

MOST_SECONDS, MOST_BYTES = 25 * 60, 4e9
LLAMA_1B = Shape(inner=8192, vocab=128_256, kv_heads=8, is_tied=True)

_BAR = re.compile(r"\r?([a-z]+): +\d+%")


def cpu_seconds(process: int) -> float:
    """User and system time of all threads of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(model: str, out: Path, precision: str, flags: list[str]) -> dict[str, Any]:
    """Export, and print the phases; seconds, CPU seconds and peak bytes."""
    command = [
        sys.executable,
        "-m",
        "headrace",
        "export",
        model,
        "--out",
        str(out),
        "--precision",
        precision,
        "--force",
    ]
    marks = [("start", time.perf_counter(), 0.0)]
    with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        told = ""
        while data := os.read(process.stderr.fileno(), 1 << 16):
            told = (told + data.decode())[-4000:]
            if (names := _BAR.findall(told)) and names[-1] != marks[-1][0]:
                marks.append((names[-1], time.perf_counter(), cpu_seconds(process.pid)))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(told)
    marks.append(("", time.perf_counter(), usage.ru_utime + usage.ru_stime))
    phases = [
        {"phase": name, "seconds": end - begin, "cpu_seconds": cpu_end - cpu}
        for (name, begin, cpu), (_, end, cpu_end) in pairwise(marks)
    ]
    row: dict[str, Any] = {
        "precision": precision, "seconds": marks[-1][1] - marks[0][1], "cpu_seconds": marks[-1][2],
        "peak": usage.ru_maxrss * 1024, "phases": phases,
    }  # fmt: skip
    for phase in [*phases, {"phase": "all", **row}]:
        print(f"{precision:10}{phase['phase']:14}{phase['seconds']:10.1f}{phase['cpu_seconds']:10.1f}")
    print(f"{precision:10}{'peak MB':14}{row['peak'] / 1e6:10,.0f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: a random one")
    parser.add_argument("--precision", default="w8a8,w4a16", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=16, help="of the random model; default: %(default)s")
    parser.add_argument("--samples", type=int, help="calibration sequences; default: the export's own")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    flags = [] if args.samples is None else ["--calibration-samples", str(args.samples)]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "random"
        if args.model is None:
            checkpoint.mkdir()
            size = write_random(checkpoint, replace(LLAMA_1B, num_layers=args.layers))
            print(f"checkpoint: {args.layers} layers, {size / 1e9:.2f} GB in bf16")
        print(f"{'precision':10}{'phase':14}{'seconds':>10}{'CPU s':>10}")
        rows = [
            measure(args.model or str(checkpoint), Path(scratch) / precision, precision, flags)
            for precision in args.precision.split(",")
        ]
    print(json.dumps({"benchmark": "calibration_time", "machine": describe_machine()._asdict(), "rows": rows}))
    if any(row["seconds"] > MOST_SECONDS or row["peak"] > MOST_BYTES for row in rows):
        sys.exit(f"calibration_time: more than {MOST_SECONDS / 60:.0f} minutes or {MOST_BYTES / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
