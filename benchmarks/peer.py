"""What the comparisons with other tools share: cases run in turn on both sides, and the table.

A peer's worker (benchmarks/peer_process.py) answers {"batch": b, "prompt": p, "new_tokens": n} with {"prefill_s": s,
"step_s": s, "settings": what it chose}. Both sides are greedy and run the same prompt lengths; ours is the session and
the choice of a token, without the engine around it, as the peers have none.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peer_models import SHAPES, SMOLLM2, checkpoint_of
from benchmarks.peer_process import PeerProcess, environment_python, running_worker
from export.pipeline.export_model import ExportOptions, export_model
from export.schemes.registry import SCHEMES
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.registry import AUTO, BACKENDS, open_session
from runtime.commands.bench_runs import decode, prefill
from runtime.commands.roofline import describe_machine
from runtime.errors import HeadraceError, InvalidArtifact
from runtime.machine.progress import progress_bar
from runtime.machine.user_cache import cache_dir
from runtime.session.session import Session
from runtime.settings import EngineSettings

NUM_SLOTS, CAPACITY = 32, 1024


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
    has_cpu_time: whether its worker knows --cpu-time
    model: the peer's file or directory, by its Python, the cache, the shape and its precision; made if it is not there
    """

    key: str
    column: str
    packages: Sequence[str]
    environment: Mapping[str, str]
    worker: Path
    counterpart: Mapping[str, str]
    wanted: Mapping[tuple[str, str], float]
    model: Callable[[Path, Path, str, str], Path]
    has_cpu_time: bool = True


def peer_python(tool: PeerTool, cache: Path) -> Path:
    """The peer's interpreter, its environment made if it is missing or was left half made."""
    venv = cache / f"{tool.key}-venv"
    return environment_python(venv, tool.column, tool.packages, environment=tool.environment)


def our_artifacts(wanted: str, cache: Path, shape: str) -> list[Ours]:
    """`w8a8,mine=PATH`: artifacts by path, or exported into the cache under the precision's name if not there."""
    found = []
    for part in wanted.split(","):
        name, is_path, path = part.partition("=")
        if is_path:
            found.append(Ours(name, open_artifact(path, allow_failed=True)))
        elif part in SCHEMES:
            found.append(Ours(part, _exported(cache / f"headrace-{shape}-{part}", part, checkpoint_of(shape, cache))))
        else:
            raise HeadraceError(f"--ours {part!r} is neither NAME=ARTIFACT nor one of {', '.join(SCHEMES)}")
    return found


def _exported(out: Path, precision: str, model: str) -> Artifact:
    """Also one that fails its accuracy gates: speed does not depend on them, and random weights have none to lose."""
    try:
        return open_artifact(out, allow_failed=True)
    except InvalidArtifact:
        return export_model(ExportOptions(model=model, out=out, precision=precision, max_len=2048, force=True))


def seconds_of(peer: PeerProcess, case: Case) -> tuple[float, str]:
    """The peer's seconds of the prefill, or of a decode step, and the settings it chose."""
    answer = peer.ask({"batch": case.batch, "prompt": case.prompt, "new_tokens": case.steps})
    return float(answer["step_s" if case.steps else "prefill_s"]), answer.get("settings", "")


def compare(
    session: Session, peer: PeerProcess, cases: Sequence[Case], repeat: int, *, is_cpu_time: bool = False
) -> list[dict[str, Any]]:
    """One row a case: tokens a second of both sides, medians of runs taken in turn, and the median of their ratios."""
    decoded = [case for case in cases if case.steps]
    for slot in range(max((case.batch for case in decoded), default=0)):  # decoding is to read a cache that was written
        prefill(session, max(case.prompt for case in decoded), slot=slot)
    rows = []
    with progress_bar("in turn", total=len(cases) * (repeat + 1), unit="pair") as bar:
        for case in cases:
            pairs, settings = [], ""
            for _ in range(repeat + 1):
                ours = _measure_ours(session, case, is_cpu_time=is_cpu_time)
                theirs, settings = seconds_of(peer, case)
                pairs.append((ours, theirs))
                bar.update(1)
            rows.append({"case": case.name, **_figures(case, pairs[1:]), "settings": settings})  # the first warms up
    return rows


def _figures(case: Case, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    tokens = case.batch if case.steps else case.prompt
    ours_s, peer_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(theirs / our for our, theirs in pairs)
    return {
        "ours": tokens / ours_s,
        "peer": tokens / peer_s,
        "ratio": statistics.median(ratios),
        "lowest_ratio": ratios[0],
        "highest_ratio": ratios[-1],
    }


def _measure_ours(session: Session, case: Case, *, is_cpu_time: bool) -> float:
    """Seconds of the prefill, or of a decode step."""
    started_s = time.process_time()
    seconds = decode(session, case.batch, case.prompt, case.steps) if case.steps else prefill(session, case.prompt)
    return (time.process_time() - started_s) / max(1, case.steps) if is_cpu_time else seconds


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
    add_common_flags(parser)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs of each case; default: %(default)s")
    names = [case.name for case in CASES]
    parser.add_argument(
        "--cases", default=",".join(names), metavar="LIST", help="comma-separated cases; default: %(default)s"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread a side, and its seconds of CPU instead of the clock's: for a machine that others use",
    )
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has the peer installed")
    args = parser.parse_args()
    if args.cpu_time and not tool.has_cpu_time:
        parser.error(f"{tool.column} is compared by the clock only")
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    if not set(args.cases.split(",")) <= set(names):
        parser.error(f"--cases must be of {', '.join(names)}")
    try:
        _compare_all(tool, args)
    except HeadraceError as error:
        sys.exit(f"versus_{tool.key}: {error}")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, what runs ours, and where everything is kept."""
    parser.add_argument("--shape", choices=SHAPES, default=SMOLLM2, help="the model; default: %(default)s")
    devices = [AUTO, *(backend.name for backend in BACKENDS)]
    parser.add_argument("--device", choices=devices, default="cpu", help="what runs ours; default: %(default)s")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "benchmarks", help="default: %(default)s")


def _compare_all(tool: PeerTool, args: argparse.Namespace) -> None:
    args.cache.mkdir(parents=True, exist_ok=True)
    python = args.peer_python or peer_python(tool, args.cache)
    cases = [case for case in CASES if case.name in args.cases.split(",")]
    results, version = {}, ""
    ours = our_artifacts(args.ours, args.cache, args.shape)
    for one in ours:
        if one.artifact.manifest.precision not in tool.counterpart:
            raise HeadraceError(
                f"{one.name} is {one.artifact.manifest.precision}; {tool.column} has a counterpart of "
                f"{', '.join(tool.counterpart)}"
            )
    print(f"{'':32}{'headrace':>10}{tool.column:>10}{'ratio':>8}{'(range)':>14}{'wanted':>8}   tokens/s")
    threads = 1 if args.cpu_time else None
    settings = EngineSettings(
        device=args.device, max_batch=NUM_SLOTS, max_len=CAPACITY, threads=threads, kv_memory=10**11
    )
    for one in ours:
        theirs = tool.counterpart[one.artifact.manifest.precision]
        session = open_session(one.artifact, settings)
        model = tool.model(python, args.cache, args.shape, theirs)
        with running_worker(python, tool.worker, model, is_cpu_time=args.cpu_time) as peer:
            rows = compare(session, peer, cases, args.repeat, is_cpu_time=args.cpu_time)
            version = peer.version
        session.close()
        for row in rows:
            row["wanted"] = tool.wanted.get((one.kind, row["case"]))
            _print_row(f"{one.name} / {theirs}", row)
        results[one.name] = {"precision": one.kind, "peer_precision": theirs, "cases": rows}
    head = {"benchmark": f"versus_{tool.key}", "peer": f"{tool.column} {version}", "repeat": args.repeat}
    head |= {"shape": args.shape, "device": args.device, "cpu_time": args.cpu_time}
    print(json.dumps({**head, "machine": describe_machine()._asdict(), "results": results}))


def _print_row(pair: str, row: Mapping[str, Any]) -> None:
    spread = f"({row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f})"
    wanted = "" if row["wanted"] is None else f"{row['wanted']:.2f}"
    print(
        f"{pair:20}{row['case']:12}{row['ours']:10,.1f}{row['peer']:10,.1f}{row['ratio']:8.2f}{spread:>14}{wanted:>8}"
        f"   {row['settings']}",
        flush=True,
    )
