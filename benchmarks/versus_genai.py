"""Headrace against onnxruntime-genai 0.18's own export of the same weights and precision, in turn (A B A B).

usage: python benchmarks/versus_genai.py [--precision int8,int4] [--repeat 5] [--cache DIR] [--peer-python PYTHON]

The peer lives in a virtual environment of its own (made in --cache on first use; about 1.5 GB with torch, which its
model builder needs), runs as a process of its own, and works only while it is asked. Both sides are greedy and run the
same prompt lengths on the threads they choose by default; ours is the session and the choice of a token, without the
engine around it, as the peer has none. Three minutes once everything is there. Prints a table of medians and ratios,
then one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from export.default_model import cache_dir, default_model_file
from export.pipeline import ExportOptions, export_model
from runtime.artifact import open_artifact
from runtime.bench_runs import decode, prefill
from runtime.errors import HeadraceError, InvalidArtifact
from runtime.ort_session import OrtSession
from runtime.progress import progress_bar
from runtime.roofline import describe_machine

PEER_PACKAGES = ("onnxruntime-genai==0.18.*", "torch==2.13.0", "transformers>=5,<6", "accelerate", "gguf", "onnx-ir")
OURS = {"int8": "w8a16", "int4": "w4a16"}
WORKER = Path(__file__).with_name("genai_worker.py")
NUM_SLOTS, CAPACITY = 32, 1024


class Case(NamedTuple):
    """What both sides do, and the ratio asked for. Without decode steps it is the prefill that counts."""

    name: str
    batch: int
    prompt: int
    steps: int
    wanted: float


CASES = (Case("prefill 512", 1, 512, 0, 1.8), Case("decode x32", 32, 128, 16, 1.5), Case("decode x1", 1, 128, 96, 1.1))


def run(what: str, *command: str | Path) -> None:
    """Run a step of the preparation; HeadraceError with the end of what it said if it fails."""
    sys.stderr.write(f"versus_genai: {what} ...\n")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HeadraceError(f"{what} failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def peer_python(cache: Path) -> Path:
    """The peer's interpreter, its environment made if it is missing or was left half made."""
    venv = cache / "genai-venv"
    python, mark = venv / "bin" / "python", venv / "complete"
    if not mark.exists():
        run("making the peer's virtual environment", sys.executable, "-m", "venv", "--clear", venv)
        run("installing the peer (1.5 GB)", python, "-m", "pip", "install", "--quiet", *PEER_PACKAGES)
        mark.touch()
    return python


def peer_model(python: Path, cache: Path, precision: str) -> Path:
    """The peer's export of the default model. What was interrupted is begun again: the last step renames."""
    source, out = cache / "genai-source", cache / f"genai-{precision}"
    if not source.exists():
        partial = source.with_name(f"{source.name}.partial")
        run("saving the default model for the peer", python, WORKER, "save", default_model_file(), partial)
        partial.rename(source)
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        builder = (python, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", partial)
        run(f"the peer's {precision} export", *builder, "-p", precision, "-e", "cpu", "-c", cache / "builder")
        partial.rename(out)
    return out


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

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.version: str = self._answer()["version"]

    def measure(self, case: Case) -> float:
        """Seconds of the prefill, or of a decode step. HeadraceError if the process has ended."""
        question = {"batch": case.batch, "prompt": case.prompt, "new_tokens": max(1, case.steps)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["step_s" if case.steps else "prefill_s"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HeadraceError(f"the peer ended with exit code {self._process.wait()}; it says why above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running_peer(python: Path, model: Path) -> Iterator[Peer]:
    """The peer with its model loaded; ended by closing its input, killed if that does not end it."""
    process = subprocess.Popen(
        [str(python), str(WORKER), str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Peer(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure_ours(session: OrtSession, case: Case) -> float:
    """Seconds of the prefill, or of a decode step."""
    return decode(session, case.batch, case.prompt, case.steps) if case.steps else prefill(session, case.prompt)


def compare(session: OrtSession, peer: Peer, repeat: int) -> list[dict[str, Any]]:
    """One row a case: tokens a second of both sides, medians of runs taken in turn, and the median of their ratios."""
    for slot in range(NUM_SLOTS):  # decoding is to read a cache that was written
        prefill(session, max(case.prompt for case in CASES if case.steps), slot=slot)
    rows = []
    with progress_bar("in turn", total=len(CASES) * (repeat + 1), unit="pair") as bar:
        for case in CASES:
            pairs = []
            for _ in range(repeat + 1):
                pairs.append((measure_ours(session, case), peer.measure(case)))
                bar.update(1)
            pairs = pairs[1:]  # the first warms up
            tokens = case.batch if case.steps else case.prompt
            ours_s, peer_s = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = sorted(theirs / our for our, theirs in pairs)
            rows.append({
                "case": case.name, "ours": tokens / ours_s, "peer": tokens / peer_s, "ratio": statistics.median(ratios),
                "lowest_ratio": ratios[0], "highest_ratio": ratios[-1], "wanted": case.wanted,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8,int4", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs of each case; default: %(default)s")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "benchmarks", help="default: %(default)s")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has the peer and its builder installed")
    args = parser.parse_args()
    precisions = args.precision.split(",")
    if args.repeat < 1 or not set(precisions) <= set(OURS):
        parser.error(f"--repeat must be at least 1 and --precision among {', '.join(OURS)}")
    args.cache.mkdir(parents=True, exist_ok=True)
    python = args.peer_python or peer_python(args.cache)
    results, version = {}, ""
    print(f"{'':22}{'headrace':>10}{'genai':>10}{'ratio':>8}{'(range)':>14}{'wanted':>8}   tokens/s")
    for precision in precisions:
        theirs, mine = peer_model(python, args.cache, precision), our_model(args.cache, precision)
        session = OrtSession.open(open_artifact(mine), num_slots=NUM_SLOTS, capacity=CAPACITY)
        with running_peer(python, theirs) as peer:
            results[precision], version = compare(session, peer, args.repeat), peer.version
        session.close()
        for row in results[precision]:
            spread = f"({row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f})"
            print(
                f"{precision:6}{row['case']:16}{row['ours']:10,.1f}{row['peer']:10,.1f}{row['ratio']:8.2f}{spread:>14}"
                f"{row['wanted']:8.1f}",
                flush=True,
            )
    machine = describe_machine()._asdict()
    head = {"benchmark": "versus_genai", "peer": f"onnxruntime-genai {version}", "repeat": args.repeat}
    print(json.dumps({**head, "machine": machine, "results": results}))


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        sys.exit(f"versus_genai: {error}")
