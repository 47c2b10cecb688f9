"""`headrace export`: flags in, one artifact out."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from export.schemes.registry import AUTO, IMPORTED, SCHEMES
from runtime.artifact.manifest import DIALECT_NAMES
from runtime.errors import InvalidSetting

if TYPE_CHECKING:
    from export.artifact.identity import Present
    from export.checkpoint.lora.adapter import Lora
    from runtime.artifact.manifest import Artifact


OLD_FLAGS = {
    "--calib": "--calibration-text",
    "--calib-samples": "--calibration-samples",
    "--calib-length": "--calibration-length",
    "--calibration": "--reuse-calibration",
    "--keep-calibration": "--keep-calibration-text",
    "--keep": "--two-pass-layers",
}
"""Earlier names, which still work."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace export",
        description="Export a Hugging Face causal language model to ONNX with a KV cache, and check the result.",
    )
    parser.add_argument("model", help="hub id, local directory, .gguf file, or smollm2-135m-instruct")
    choices = (*SCHEMES, IMPORTED, AUTO)
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=choices,
        help="types of weights (w) and activations (a), of a quantized checkpoint (imported), or the fastest (auto); "
        "default: %(default)s",
    )
    parser.add_argument(
        "--dialect",
        metavar="LIST",
        help="comma-separated graphs to write: ort (ONNX Runtime's own operators), native (operators of make native), "
        "standard (standard ONNX, opset 24; TensorRT 10.15 and later), standard-21 (opset 21; TensorRT 10.3); default: "
        "ort, and native where its operators are built and the precision has it",
    )
    parser.add_argument(
        "--kv",
        default="compute",
        choices=("compute", "int8"),
        help="type of the KV cache: the precision's own, or int8 with calibrated scales; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, help="artifact directory; default: artifacts/NAME-PRECISION[-kv-int8]")
    parser.add_argument(
        "--optimize-for", choices=("latency", "throughput"), help="what --precision auto measures; default: latency"
    )
    parser.add_argument("--max-len", type=int, help="longest sequence in tokens; default: the model's, at most 32768")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help="PEFT adapter to merge into the weights, with the weight 1 if none is given; several add up",
    )
    parser.add_argument(
        "--if-missing", action="store_true", help="do nothing if --out is already a good artifact of this model"
    )
    parser.add_argument(
        "--replace", action="store_true", help="delete another model's artifact, or one with your own files, at --out"
    )
    _add_check_flags(parser)
    _add_calibration_flags(parser)
    return parser


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    checks = parser.add_argument_group("checks of the exported model")
    checks.add_argument(
        "--verify",
        default="numpy",
        choices=("numpy", "transformers"),
        help="what to compare with: numpy, the project's own decoder, or transformers where it is installed; "
        "default: %(default)s",
    )
    checks.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="FIGURE=LIMIT",
        help="another limit for a figure of the receipt, like perplexity_increase=0.005; may be repeated",
    )
    checks.add_argument("--force", action="store_true", help="write the artifact even if it fails a check")


def _add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    calibration = parser.add_argument_group("calibration, for w8a8, w4a16, auto and --kv int8")
    calibration.add_argument(
        "--calibration-text",
        metavar="SOURCE",
        help="built-in, self, a .jsonl/.txt/.parquet file, or a dataset id; default: built-in",
    )
    calibration.add_argument(
        "--calibration-samples", type=int, metavar="N", help="sequences to calibrate on; default: 128, for w8a8 32"
    )
    calibration.add_argument("--calibration-length", type=int, metavar="N", help="tokens of a sequence; default: 512")
    calibration.add_argument(
        "--reuse-calibration", type=Path, metavar="PATH", help="take the calibration of an artifact or calibration.json"
    )
    calibration.add_argument(
        "--keep-calibration-text",
        action="store_true",
        help="keep the calibration text in the artifact, as token ids; default: only what was measured on it",
    )
    calibration.add_argument(
        "--max-ppl-increase",
        default="0.5%",
        metavar="SHARE",
        help="perplexity increase that int8 layers may cause; beyond it the worst take two int8 passes; default: 0.5%%",
    )
    calibration.add_argument(
        "--two-pass-layers",
        default="",
        metavar="LIST",
        help="layers that take two int8 passes, like layers.11.down,layers.28.down",
    )
    calibration.add_argument(
        "--ignore-memory", action="store_true", help="start although the memory it is predicted to take is not free"
    )


def _with_new_names(argv: Sequence[str]) -> list[str]:
    parts = [arg.partition("=") for arg in argv]
    return [f"{OLD_FLAGS.get(flag, flag)}{equals}{value}" for flag, equals, value in parts]


def main(argv: list[str]) -> int:
    """Export, then print the receipt's figures and the artifact's path."""
    args = _parser().parse_args(_with_new_names(argv))
    from export.artifact.identity import check_replaceable, default_name, identity_of
    from export.checkpoint.lora.adapter import parse_lora
    from runtime.backends.ort.graph import CPU_FLOOR, load_library

    suffix = "-kv-int8" if args.kv == "int8" else ""
    loras = tuple(map(parse_lora, args.lora))
    out = args.out or Path("artifacts") / f"{default_name(args.model, loras)}-{args.precision}{suffix}"
    wanted = identity_of(
        args.model, revision=args.revision, precision=args.precision, has_int8_kv=args.kv == "int8", loras=loras
    )
    dialects = _dialects(args)
    present = check_replaceable(out, wanted, replaces_any=args.replace)
    if args.if_missing and present is not None and wanted.is_same(present.identity):
        needed = dialects if args.dialect else ("ort",)
        if (lack := _lack(out, present, needed, args.max_len)) is None:
            sys.stdout.write(f"{out} is there already\n")
            return 0
        sys.stdout.write(f"{out} {lack}: it is exported again\n")
    load_library(CPU_FLOOR)  # without it an export would fail at its end, where the graph is verified
    if args.optimize_for is not None and args.precision != "auto":
        raise InvalidSetting(f"--optimize-for is for --precision auto; {args.precision} is chosen already")
    from export.artifact.termination import orderly_end

    with orderly_end(), _naming_what_is_kept(out):
        artifact = _export(args, out, dialects, loras)
    _print(artifact, out)
    return 0


def _dialects(args: argparse.Namespace) -> tuple[str, ...]:
    """The graphs that are asked for, or those that suit this machine."""
    from runtime.native.library import is_built

    if args.dialect:
        names = (part.strip() for part in args.dialect.split(","))
        return tuple(dict.fromkeys(DIALECT_NAMES.get(name, name) for name in names))
    scheme = SCHEMES.get(args.precision)  # imported and auto are decided later
    has_native = scheme is None or scheme.storage_of("native") is not None
    return ("ort", "native") if has_native and is_built() else ("ort",)


def _export(args: argparse.Namespace, out: Path, dialects: tuple[str, ...], loras: tuple["Lora", ...]) -> "Artifact":
    from export.calibration.dataset import calibration_options
    from export.pipeline.auto_precision import export_fastest
    from export.pipeline.calibrated import QuantizationOptions
    from export.pipeline.export_model import ExportOptions, export_model
    from export.quantize.int8.model import Int8Options
    from export.quantize.kv_cache import INT8, NUM_SEQUENCES

    options = ExportOptions(
        model=args.model,
        out=out,
        precision=args.precision,
        max_len=args.max_len,
        revision=args.revision,
        loras=loras,
        force=args.force,
        limits=_limits(args.gate),
        kv=args.kv,
        dialects=dialects,
        verify=args.verify,
        replaces=args.replace,
        keeps_calibration=args.keep_calibration_text,
        quantization=QuantizationOptions(
            text=calibration_options(
                args.precision,
                args.calibration_text,
                args.calibration_samples,
                args.calibration_length,
                for_kv=NUM_SEQUENCES if args.kv == INT8 else None,
            ),
            int8=Int8Options(
                max_ppl_increase=_share(args.max_ppl_increase),
                keep=tuple(name for name in args.two_pass_layers.replace(" ", "").split(",") if name),
            ),
            reuse=args.reuse_calibration,
            ignore_memory=args.ignore_memory,
        ),
    )
    return (
        export_fastest(options, args.optimize_for or "latency") if args.precision == "auto" else export_model(options)
    )


def _print(artifact: "Artifact", out: Path) -> None:
    from runtime.artifact.choice import choice_lines, read_choice
    from runtime.artifact.manifest import described

    if (choice := read_choice(artifact)) is not None:
        sys.stdout.write("\n".join(choice_lines(choice)) + "\n")
    for check in artifact.receipt["checks"]:
        sign = "<=" if check["at_most"] else ">="
        mark = "ok" if check["passed"] else "FAILED"
        # A figure that is not finite is text.
        value = check["value"] if isinstance(check["value"], str) else f"{check['value']:.4g}"
        sys.stdout.write(f"  {check['figure']:32}{value:<12}{sign} {check['limit']:<10g}{mark}\n")
    total = sum(entry.size for entry in artifact.manifest.files.values())
    sys.stdout.write(f"{out}: {artifact.manifest.name}, {described(artifact.manifest)}, {total / 1e6:,.0f} MB\n")


@contextmanager
def _naming_what_is_kept(out: Path) -> Iterator[None]:
    """If the export does not finish, say which directory keeps the finished part of its calibration."""
    from export.artifact.writer import resolved
    from export.pipeline.calibrated import workdir_of

    try:
        yield
    except BaseException:
        workdir = workdir_of(resolved(out))
        if workdir.is_dir():
            sys.stderr.write(f"{workdir} keeps what calibration has finished; the same command goes on from there\n")
        raise


def _limits(texts: Sequence[str]) -> dict[str, float]:
    """`kl=0.01` each."""
    limits = {}
    for text in texts:
        figure, _, limit = text.partition("=")
        try:
            limits[figure] = float(limit)
        except ValueError:
            raise InvalidSetting(f"--gate {text!r} is not FIGURE=LIMIT, like kl=0.01") from None
        if not math.isfinite(limits[figure]):
            raise InvalidSetting(f"--gate {text!r}: the limit must be a finite number")
    return limits


def _share(text: str) -> float:
    """`0.5%` or `0.005`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InvalidSetting(f"--max-ppl-increase {text!r} is not a share; give something like 0.5% or 0.005")
    return value


def _lack(out: Path, present: "Present", dialects: Sequence[str], max_len: int | None) -> str | None:
    """Why an artifact of the same model is not what was asked for; None if it is."""
    from runtime.artifact.manifest import dialect_name, open_artifact
    from runtime.errors import InvalidArtifact

    if missing := [dialect for dialect in dialects if dialect not in present.dialects]:
        return f"has no {dialect_name(missing[0])} graph"
    if max_len is not None and max_len != present.max_len:
        return f"was exported for {present.max_len} tokens"
    try:
        open_artifact(out, check_hashes=False)
    except InvalidArtifact as error:
        return f"cannot be used ({error})"
    return None
