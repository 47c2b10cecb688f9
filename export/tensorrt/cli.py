"""`headrace engine`: build a TensorRT engine of an artifact, list those it has, remove those that are of no use."""

import argparse
import logging
import sys
from collections.abc import Iterator

from runtime.artifact.manifest import Artifact, open_artifact
from runtime.artifact.plan_files import TARGETS, PlanFile, PlanInfo, plans_of
from runtime.errors import InvalidSetting
from runtime.machine.sizes import format_bytes
from runtime.settings import add_flags, from_namespace

log = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    from export.tensorrt.profiles import PlanLimits

    parser = argparse.ArgumentParser(
        prog="headrace engine",
        description="Compile an artifact's TensorRT graph. tensorrt-rtx compiles for any GPU on any machine, tensorrt "
        "for the GPU in this one. An engine that is there already is not built again.",
    )
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("--target", default=TARGETS[0], help=f"{' or '.join(TARGETS)}; default: %(default)s")
    parser.add_argument(
        "--gpu",
        default="",
        metavar="LIST",
        help="compute capabilities, like sm86,sm89; default: sm80,sm86,sm89,sm120, or this machine's for tensorrt",
    )
    add_flags(parser, PlanLimits)
    parser.add_argument(
        "--model",
        help="the checkpoint, to export a graph that the artifact lacks; needed for a local checkpoint only",
    )
    parser.add_argument("--rebuild", action="store_true", help="build although the engine is there")
    parser.add_argument("--allow-failed", action="store_true", help="compile an artifact that failed its gate")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the engines that are there, and build nothing")
    what.add_argument("--prune", action="store_true", help="remove engines that are damaged or of another export")
    parser.add_argument("--all", action="store_true", help="with --prune: remove every engine and timing cache")
    return parser


def main(argv: list[str]) -> int:
    """Build, list or prune, and print the result."""
    args = _parser().parse_args(argv)
    if args.all and not args.prune:
        raise InvalidSetting("--all goes with --prune")
    is_building = not (args.list or args.prune)
    artifact = open_artifact(args.artifact, allow_failed=args.allow_failed or not is_building, check_hashes=is_building)
    if args.prune:
        from export.tensorrt.store import prune

        gone = prune(artifact, everything=args.all)
        sys.stdout.writelines(f"removed {file}\n" for file in gone)
        sys.stdout.write(f"{len(gone)} files removed\n")
    elif args.list:
        sys.stdout.writelines(f"{line}\n" for line in _listing(artifact))
    else:
        from export.artifact.termination import orderly_end

        with orderly_end():
            _build(artifact, args)
    return 0


def _build(artifact: Artifact, args: argparse.Namespace) -> None:
    from export.pipeline.add_graph import add_graph
    from export.tensorrt.build import PlanOptions, build_plan, wanted_dialect
    from export.tensorrt.gpus import chosen_gpus, parse_gpus
    from export.tensorrt.profiles import PlanLimits, derive_profiles
    from runtime.backends.tensorrt.library import open_library

    options = PlanOptions(
        target=args.target,
        gpus=parse_gpus(args.gpu),
        limits=from_namespace(PlanLimits, args),
        rebuild=args.rebuild,
    )
    library = open_library(options.target)
    # What cannot be built is told before an export, which takes minutes.
    chosen_gpus(library, options.gpus)
    derive_profiles(options.limits, artifact.manifest.dims)
    if wanted_dialect(library, artifact) not in artifact.manifest.dialects:
        artifact = add_graph(artifact, library.dialect, model=args.model)
    if artifact.manifest.states:
        log.warning("%s has recurrent states, which --device tensorrt does not run: for other programs", artifact.path)
    built = build_plan(artifact, options)
    sys.stdout.write(f"{built.path}{'' if built.is_new else ' is there already'}\n")
    sys.stdout.writelines(f"{line}\n" for line in _details(built.info))


def _listing(artifact: Artifact) -> Iterator[str]:
    found = list(plans_of(artifact))
    if not found:
        yield f"{artifact.path} has no engines; `headrace engine {artifact.path}` builds one"
    for plan in found:
        yield from _described(plan)


def _described(plan: PlanFile) -> Iterator[str]:
    yield str(plan.path)
    if plan.problem is not None:
        yield f"  not usable: {plan.problem}"
    elif plan.info is not None:
        yield from _details(plan.info)


def _details(info: PlanInfo) -> Iterator[str]:
    """An engine's limits, layers, size and build time, for people."""
    build, device = info.build, f" ({info.device})" if info.device else ""
    yield f"  {info.target} {info.version} for {', '.join(info.gpus)}{device}, from the {info.dialect} graph"
    yield (
        f"  {info.max_batch} rows of {info.max_len:,} tokens, prefill {info.prefill_chunk}, "
        f"verify {info.verify_tokens} tokens a row"
    )
    yield f"  layers: {', '.join(f'{count} {name}' for name, count in info.layers.items() if count)}"
    yield (
        f"  {format_bytes(info.plan.size)} of {format_bytes(int(build['weight_bytes']))} weights, built in "
        f"{build['seconds']:.0f} s with {format_bytes(int(build['peak_bytes']))} of memory "
        f"({format_bytes(int(build['predicted_peak_bytes']))} predicted)"
    )
