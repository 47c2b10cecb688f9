"""What the comparisons with other tools share: the peer's environment and process, cases run in turn, the table.

A peer lives in a virtual environment of its own and runs as a process of its own, which works only while it is asked:
JSON lines in, JSON lines out. Its worker first says {"version": v}, then answers {"batch": b, "prompt": p,
"new_tokens": n} with {"prefill_s": s, "step_s": s, "settings": what it chose}. Both sides are greedy and run the same
prompt lengths; ours is the session and the choice of a token, without the engine around it, as the peers have none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from export.pipeline.export_model import ExportOptions, export_model
from export.schemes.registry import SCHEMES
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.commands.bench_runs import decode, prefill
from runtime.commands.roofline import describe_machine
from runtime.errors import HeadraceError, InvalidArtifact
from runtime.machine.progress import progress_bar
from runtime.machine.user_cache import cache_dir

NUM_SLOTS, CAPACITY = 32, 1024
# Set on our side only where somebody tunes numpy; a peer is to choose its threads as it does for everyone.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Case(NamedTuple):
    """What both sides do. Without decode steps it is the prefill that counts."""

    name: str
    batch: int
    prompt: int
    steps: int


CASES = (
    Case("prefill 512", 1, 512, 0),
    Case("decode x32", 32, 128, 16),
    Case("decode x8", 8, 128, 32),
    Case("decode x1", 1, 128, 96),
)


class Ours(NamedTuple):
    """One artifact of ours: what the table calls it, and what it is."""

    name: str
    artifact: Artifact

    @property
    def kind(self) -> str:
        """The precision, with `+kv8` if its cache holds integers."""
        manifest = self.artifact.manifest
        return manifest.precision + ("+kv8" if manifest.kv.dtype in ("int8", "uint8") else "")


class PeerTool(NamedTuple):
    """Another tool.

    key: of the JSON line and the program's name; column: its heading in the table
    packages: what pip installs, with `environment` set while it does; worker: the script its Python runs
    counterpart: our precision to the one of its own that it is compared with
    wanted: by our kind and the case, the ratio asked for
    model: the peer's file or directory of a precision, made in the cache if it is not there
    """

    key: str
    column: str
    packages: Sequence[str]
    environment: Mapping[str, str]
    worker: Path
    counterpart: Mapping[str, str]
    wanted: Mapping[tuple[str, str], float]
    model: Callable[[Path, Path, str], Path]


def run(what: str, *command: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a step of the preparation; HeadraceError with the end of what it said if it fails."""
    sys.stderr.write(f"{what} ...\n")
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise HeadraceError(f"{what} failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def peer_python(tool: PeerTool, cache: Path) -> Path:
    """The peer's interpreter, its environment made if it is missing or was left half made."""
    venv = cache / f"{tool.key}-venv"
    python, mark = venv / "bin" / "python", venv / "complete"
    if not mark.exists():
        run(f"making {tool.column}'s virtual environment", sys.executable, "-m", "venv", "--clear", venv)
        install = ("-m", "pip", "install", "--quiet", *tool.packages)
        run(f"installing {tool.column} (minutes)", python, *install, environment=tool.environment)
        mark.touch()
    return python


def our_artifacts(wanted: str, cache: Path) -> list[Ours]:
    """`w8a8,mine=PATH`: artifacts by path, or exported into the cache under the precision's name if not there."""
    found = []
    for part in wanted.split(","):
        name, is_path, path = part.partition("=")
        if is_path:
            found.append(Ours(name, open_artifact(path)))
        elif part in SCHEMES:
            found.append(Ours(part, _exported(cache / f"headrace-{part}", part)))
        else:
            raise HeadraceError(f"--ours {part!r} is neither NAME=ARTIFACT nor one of {', '.join(SCHEMES)}")
    return found


def _exported(out: Path, precision: str) -> Artifact:
    try:
        return open_artifact(out)
    except InvalidArtifact:
        return export_model(ExportOptions(model="smollm2-135m-instruct", out=out, precision=precision, max_len=2048))


class Peer:
    """The peer's process; asked one thing at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.settings: dict[str, str] = {}
        self.version: str = self._answer()["version"]

    def measure(self, case: Case) -> float:
        """Seconds of the prefill, or of a decode step. HeadraceError if the process has ended."""
        question = {"batch": case.batch, "prompt": case.prompt, "new_tokens": case.steps}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.settings[case.name] = answer.get("settings", "")
        return float(answer["step_s" if case.steps else "prefill_s"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HeadraceError(f"the peer ended with exit code {self._process.wait()}; it says why above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running_peer(python: Path, worker: Path, model: Path) -> Iterator[Peer]:
    """The peer with its model loaded; ended by closing its input, killed if that does not end it."""
    environment = {key: value for key, value in os.environ.items() if key not in _THREAD_VARIABLES}
    process = subprocess.Popen(
        [str(python), str(worker), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
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


def compare(session: OrtSession, peer: Peer, repeat: int) -> list[dict[str, Any]]:
    """One row a case: tokens a second of both sides, medians of runs taken in turn, and the median of their ratios."""
    longest = max(case.prompt for case in CASES if case.steps)
    for slot in range(NUM_SLOTS):  # decoding is to read a cache that was written
        prefill(session, longest, slot=slot)
    rows = []
    with progress_bar("in turn", total=len(CASES) * (repeat + 1), unit="pair") as bar:
        for case in CASES:
            pairs = []
            for _ in range(repeat + 1):
                pairs.append((_measure_ours(session, case), peer.measure(case)))
                bar.update(1)
            pairs = pairs[1:]  # the first warms up
            tokens = case.batch if case.steps else case.prompt
            ours_s, peer_s = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = sorted(theirs / our for our, theirs in pairs)
            rows.append({
                "case": case.name, "ours": tokens / ours_s, "peer": tokens / peer_s, "ratio": statistics.median(ratios),
                "lowest_ratio": ratios[0], "highest_ratio": ratios[-1], "settings": peer.settings[case.name],
            })  # fmt: skip
    return rows


def _measure_ours(session: OrtSession, case: Case) -> float:
    """Seconds of the prefill, or of a decode step."""
    return decode(session, case.batch, case.prompt, case.steps) if case.steps else prefill(session, case.prompt)


def versus(tool: PeerTool, description: str, *, default_ours: str) -> None:
    """The program: flags, comparisons, the table, one JSON line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ours",
        default=default_ours,
        metavar="LIST",
        help="comma-separated precisions of ours, exported if they are not in the cache, or NAME=ARTIFACT; "
        "default: %(default)s",
    )
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs of each case; default: %(default)s")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "benchmarks", help="default: %(default)s")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has the peer installed")
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    try:
        _compare_all(tool, args)
    except HeadraceError as error:
        sys.exit(f"versus_{tool.key}: {error}")


def _compare_all(tool: PeerTool, args: argparse.Namespace) -> None:
    args.cache.mkdir(parents=True, exist_ok=True)
    python = args.peer_python or peer_python(tool, args.cache)
    results, version = {}, ""
    ours = our_artifacts(args.ours, args.cache)
    for one in ours:
        if one.artifact.manifest.precision not in tool.counterpart:
            raise HeadraceError(
                f"{one.name} is {one.artifact.manifest.precision}; {tool.column} has a counterpart of "
                f"{', '.join(tool.counterpart)}"
            )
    print(f"{'':32}{'headrace':>10}{tool.column:>10}{'ratio':>8}{'(range)':>14}{'wanted':>8}   tokens/s")
    for one in ours:
        theirs = tool.counterpart[one.artifact.manifest.precision]
        session = OrtSession.open(one.artifact, num_slots=NUM_SLOTS, capacity=CAPACITY)
        with running_peer(python, tool.worker, tool.model(python, args.cache, theirs)) as peer:
            rows, version = compare(session, peer, args.repeat), peer.version
        session.close()
        for row in rows:
            row["wanted"] = tool.wanted.get((one.kind, row["case"]))
            _print_row(f"{one.name} / {theirs}", row)
        results[one.name] = {"precision": one.kind, "peer_precision": theirs, "cases": rows}
    head = {"benchmark": f"versus_{tool.key}", "peer": f"{tool.column} {version}", "repeat": args.repeat}
    print(json.dumps({**head, "machine": describe_machine()._asdict(), "results": results}))


def _print_row(pair: str, row: Mapping[str, Any]) -> None:
    spread = f"({row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f})"
    wanted = "" if row["wanted"] is None else f"{row['wanted']:.2f}"
    print(
        f"{pair:20}{row['case']:12}{row['ours']:10,.1f}{row['peer']:10,.1f}{row['ratio']:8.2f}{spread:>14}{wanted:>8}"
        f"   {row['settings']}",
        flush=True,
    )
