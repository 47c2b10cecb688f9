"""OpenVINO against ONNX Runtime on one artifact: prefill and decode steps in turn, each side in a process of its own.

A pair runs one case on both sides, and the next pair in the other order, so that a machine that slows down slows both.
Time is the seconds of CPU that one thread takes: other programs on the machine change it little, where they change the
wall clock by a multiple. `--wall THREADS` takes the wall clock instead, on a quiet machine.

python -m benchmarks.versus_openvino ARTIFACT [--pairs 3] [--wall 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from runtime.artifact.manifest import open_artifact
from runtime.backends.registry import open_session
from runtime.commands.bench_runs import decode, prefill
from runtime.settings import EngineSettings

SIDES = ("cpu", "openvino")
NUM_SLOTS, CAPACITY, CONTEXT = 32, 544, 128


class Case(NamedTuple):
    """A prompt of so many tokens, or decode steps of so many rows; `steps` is 0 for a prompt."""

    size: int
    steps: int

    def __str__(self) -> str:
        return f"decode x{self.size}" if self.steps else f"prefill {self.size}"


CASES = (Case(128, 0), Case(512, 0), Case(1, 12), Case(8, 8), Case(32, 4))


class Side:
    """One backend in a process of its own."""

    def __init__(self, artifact: str, device: str, wall: int) -> None:
        command = [sys.executable, "-m", "benchmarks.versus_openvino", artifact, "--side", device, "--wall", str(wall)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, case: Case) -> float:
        """Of a prompt, or of one decode step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve_side(artifact: str, device: str, wall: int) -> None:
    """Answer each case on standard input with its seconds."""
    settings = EngineSettings(device=device, max_batch=NUM_SLOTS, max_len=CAPACITY, threads=wall or 1, kv_memory=10**10)
    session = open_session(open_artifact(artifact, allow_failed=True), settings)
    clock = time.perf_counter if wall else time.process_time
    for slot in range(NUM_SLOTS):
        prefill(session, CONTEXT, slot=slot)
    prefill(session, CASES[1].size)
    for line in sys.stdin:
        case = Case(*json.loads(line))
        started_s = clock()
        if case.steps:
            decode(session, case.size, CONTEXT, case.steps)
        else:
            prefill(session, case.size)
        print((clock() - started_s) / max(1, case.steps), flush=True)


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description="OpenVINO against ONNX Runtime on the CPU, in turn.")
    parser.add_argument("artifact")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--wall", type=int, default=0, metavar="THREADS", help="wall clock, with so many threads")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve_side(args.artifact, args.side, args.wall)
        return
    sides = [Side(args.artifact, device, args.wall) for device in SIDES]
    found: dict[str, dict[str, object]] = {}
    print(f"{'':12}{'cpu':>10}{'openvino':>10}   ratio  (tokens a second{'' if args.wall else ' of CPU'})")
    for case in CASES:
        pairs = []
        for idx in range(args.pairs):
            order = sides if idx % 2 == 0 else sides[::-1]
            taken = [side.seconds(case) for side in order]
            pairs.append(taken if idx % 2 == 0 else taken[::-1])
        ratios = sorted(ort / openvino for ort, openvino in pairs)
        speeds = [case.size / statistics.median(times) for times in zip(*pairs, strict=True)]
        ratio = statistics.median(ratios)
        print(f"{case!s:12}{speeds[0]:10,.0f}{speeds[1]:10,.0f}   {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
        found[str(case)] = {"cpu": speeds[0], "openvino": speeds[1], "ratio": ratio, "ratios": ratios}
    for side in sides:
        side.close()
    print(json.dumps({"benchmark": "versus_openvino", "artifact": args.artifact, "wall": args.wall, "cases": found}))


if __name__ == "__main__":
    main()
