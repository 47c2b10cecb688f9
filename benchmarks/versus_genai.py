"""Headrace against onnxruntime-genai 0.18's own export of the same weights and precision, in turn (A B A B).

usage: python benchmarks/versus_genai.py [--precision int8,int4] [--repeat 5] [--cache DIR] [--peer-python PYTHON]

The peer lives in a virtual environment of its own (made in --cache on first use; about 1.5 GB with torch, which its
model builder needs), runs as a process of its own, and works only while it is asked. Both sides greedy, choosing each
token included, the same prompt lengths, all threads. Prints a table of medians and ratios, then one JSON line.
"""

import argparse
import json
import select
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.default_model import cache_dir, default_model_file
from export.pipeline import ExportOptions, export_model
from runtime.artifact import open_artifact
from runtime.bench import decode, fill_cache, prefill
from runtime.errors import InvalidArtifact
from runtime.ort_session import OrtSession
from runtime.roofline import describe_machine

PEER_PACKAGES = ("onnxruntime-genai==0.18.*", "torch==2.13.0", "transformers>=5,<6", "accelerate", "gguf", "onnx-ir")
OURS = {"int8": "w8a16", "int4": "w4a16"}
WORKER = Path(__file__).with_name("genai_worker.py")
SETUP_TIMEOUT_S = 1800  # a slow download of torch
MEASURE_TIMEOUT_S = 300  # the longest single run takes some tens of seconds on two cores
# name, batch, prompt tokens, decode steps, the ratio asked for
CASES = (("prefill 512", 1, 512, 1, 1.8), ("decode x32", 32, 128, 16, 1.5), ("decode x1", 1, 128, 32, 1.1))


def peer_python(cache: Path) -> Path:
    """The peer's interpreter, its environment made if it is missing."""
    home = cache / "genai-venv"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        print("setting up the peer's environment: 1.5 GB, some minutes", file=sys.stderr, flush=True)
        run([sys.executable, "-m", "venv", "--clear", str(home)])
        run([str(python), "-m", "pip", "install", "--quiet", *PEER_PACKAGES])
        complete.touch()
    return python


def run(command: list[str]) -> None:
    """Run a step of the set-up; if it fails or hangs, end with the last lines it wrote."""
    try:
        subprocess.run(command, check=True, timeout=SETUP_TIMEOUT_S, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)} failed with {error.returncode}:\n{error.stderr[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"{' '.join(command)} took more than {SETUP_TIMEOUT_S} s") from error


def peer_model(python: Path, cache: Path, precision: str) -> Path:
    """The peer's export of the default model."""
    source, out = cache / "genai-source", cache / f"genai-{precision}"
    if not source.exists():
        with half_made(source) as part:
            run([str(python), str(WORKER), "save", str(default_model_file()), str(part)])
    if not out.exists():
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-p", precision]
        with half_made(out) as part:
            run([*builder, "-e", "cpu", "-o", str(part), "-c", str(cache / "builder")])
    return out


@contextmanager
def half_made(directory: Path) -> Iterator[Path]:
    """Another name to write to; it becomes `directory` when the block ends well."""
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    part.rename(directory)


def our_model(cache: Path, precision: str) -> Path:
    """Our export of the same weights."""
    out = cache / f"headrace-{OURS[precision]}"
    try:
        open_artifact(out)
    except InvalidArtifact:
        export_model(ExportOptions(model="smollm2-135m-instruct", out=out, precision=OURS[precision], max_len=2048))
    return out


class Peer:
    """The peer's process; asked one thing at a time."""

    def __init__(self, python: Path, model: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), str(WORKER), str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"batch": batch, "prompt": prompt, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], MEASURE_TIMEOUT_S)[0]:
            raise SystemExit(f"the peer did not answer within {MEASURE_TIMEOUT_S} s (batch {batch}, prompt {prompt})")
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with {self._process.wait()} (batch {batch}, prompt {prompt})")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        # It holds nothing worth saving, and may be in the middle of a long run.
        self._process.kill()
        self._process.wait()


def compare(ours: OrtSession, peer: Peer, repeat: int) -> list[dict[str, Any]]:
    """One row a case: tokens a second of both sides, medians of runs taken in turn, and their ratio."""
    fill_cache(ours, max(prompt for name, _, prompt, *_ in CASES if name.startswith("decode")))
    rows = []
    for name, batch, prompt, steps, wanted in CASES:
        pairs = []
        for turn in range(repeat + 1):  # the first pair warms up
            if name.startswith("prefill"):
                pair = (prefill(ours, prompt), peer.measure(batch, prompt, steps)["prefill_s"])
            else:
                pair = (decode(ours, batch, prompt, steps), peer.measure(batch, prompt, steps)["step_s"])
            if turn:
                pairs.append(pair)
        tokens = prompt if name.startswith("prefill") else batch
        ours_s, peer_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / our for our, theirs in pairs)
        rows.append({"case": name, "ours": tokens / ours_s, "peer": tokens / peer_s, "ratio": ratio, "wanted": wanted})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8,int4")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=cache_dir() / "benchmarks")
    parser.add_argument("--peer-python", type=Path)
    args = parser.parse_args()
    precisions = args.precision.split(",")
    if unknown := [name for name in precisions if name not in OURS]:
        parser.error(f"--precision {unknown[0]!r} is not one of {', '.join(OURS)}")
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat} must be at least 1")
    args.cache.mkdir(parents=True, exist_ok=True)
    python = args.peer_python or peer_python(args.cache)
    results = {}
    print(f"{'':22}{'headrace':>10}{'genai':>10}{'ratio':>8}{'wanted':>8}   tokens/s")
    for precision in precisions:
        theirs, mine = peer_model(python, args.cache, precision), our_model(args.cache, precision)
        session = OrtSession.open(open_artifact(mine), num_slots=32, capacity=1024)
        with Peer(python, theirs) as peer:
            results[precision] = compare(session, peer, args.repeat)
        session.close()
        for row in results[precision]:
            print(
                f"{precision:6}{row['case']:16}{row['ours']:10,.1f}{row['peer']:10,.1f}"
                f"{row['ratio']:8.2f}{row['wanted']:8.1f}",
                flush=True,
            )
    machine = describe_machine()._asdict()
    print(json.dumps({"benchmark": "versus_genai", "repeat": args.repeat, "machine": machine, "results": results}))


if __name__ == "__main__":
    main()
