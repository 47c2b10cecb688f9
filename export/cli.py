"""`headrace export`: flags in, one artifact out."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.artifact import DIALECT_FILES, PRECISIONS
from runtime.errors import InvalidSetting


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace export",
        description="Write a Hugging Face causal language model as an ONNX artifact with KV-cache inputs, verified.",
    )
    parser.add_argument("model", help="hub id, local directory, .gguf file, or smollm2-135m-instruct")
    choices = (*PRECISIONS, "imported", "auto")
    parser.add_argument("--precision", default="fp32", choices=choices, help="default: %(default)s")
    parser.add_argument(
        "--dialect",
        default="ort",
        help=f"comma-separated graphs to write, of {', '.join(DIALECT_FILES)}; default: %(default)s",
    )
    parser.add_argument(
        "--kv",
        default="compute",
        choices=("compute", "int8"),
        help="type of the KV cache: the precision's own, or int8 with calibrated scales; default: %(default)s",
    )
    parser.add_argument(
        "--out", type=Path, help="artifact directory; default: artifacts/NAME-PRECISION, with -kv-int8 behind it"
    )
    parser.add_argument(
        "--optimize-for", choices=("latency", "throughput"), help="what --precision auto measures; default: latency"
    )
    parser.add_argument("--max-len", type=int, help="longest sequence in tokens; default: the model's, at most 32768")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    _add_calibration_flags(parser)
    parser.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="FIGURE=LIMIT",
        help="another limit for a figure of the receipt, like perplexity_increase=0.005; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="write the artifact even if it fails its accuracy gate")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if --out is already a good artifact")
    return parser


def _add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    calibration = parser.add_argument_group("calibration, for the precisions that need it")
    calibration.add_argument(
        "--calib",
        metavar="SOURCE",
        help="built-in, self, a .jsonl/.txt/.parquet file, or a dataset id; default: built-in",
    )
    calibration.add_argument("--calib-samples", type=int, metavar="N", help="sequences; default: 128")
    calibration.add_argument("--calib-length", type=int, metavar="N", help="tokens of a sequence; default: 512")
    calibration.add_argument(
        "--calibration", type=Path, metavar="PATH", help="use the calibration of this artifact or calibration.json"
    )
    calibration.add_argument(
        "--max-ppl-increase",
        default="0.5%",
        metavar="SHARE",
        help="perplexity increase that int8 layers may add up to before the worst take two passes; default: 0.5%%",
    )
    calibration.add_argument(
        "--keep",
        default="",
        metavar="LIST",
        help="layers that take two int8 passes, like layers.11.down,layers.28.down",
    )
    calibration.add_argument(
        "--ignore-memory", action="store_true", help="start although the memory it is predicted to take is not free"
    )


def main(argv: list[str]) -> int:
    """Export; prints the receipt's figures and where the artifact is."""
    args = _parser().parse_args(argv)
    suffix = "-kv-int8" if args.kv == "int8" else ""
    out = args.out or Path("artifacts") / f"{Path(args.model).stem.lower()}-{args.precision}{suffix}"
    if args.if_missing and _is_good(out):
        sys.stdout.write(f"{out} is there already\n")
        return 0
    if args.optimize_for is not None and args.precision != "auto":
        raise InvalidSetting(f"--optimize-for is for --precision auto; {args.precision} is chosen already")
    from export.calibrated_export import QuantizationOptions
    from export.calibration_set import calibration_options
    from export.choose_precision import export_fastest
    from export.int8_model import Int8Options
    from export.kv_calibration import INT8, NUM_SEQUENCES
    from export.pipeline import ExportOptions, export_model
    from runtime.artifact import described
    from runtime.choice import choice_lines, read_choice

    options = ExportOptions(
        model=args.model,
        out=out,
        precision=args.precision,
        max_len=args.max_len,
        revision=args.revision,
        force=args.force,
        limits=_limits(args.gate),
        kv=args.kv,
        dialects=tuple(dict.fromkeys(part.strip() for part in args.dialect.split(","))),
        quantization=QuantizationOptions(
            calib=calibration_options(
                args.precision,
                args.calib,
                args.calib_samples,
                args.calib_length,
                for_kv=NUM_SEQUENCES if args.kv == INT8 else None,
            ),
            int8=Int8Options(
                max_ppl_increase=_share(args.max_ppl_increase),
                keep=tuple(name for name in args.keep.replace(" ", "").split(",") if name),
            ),
            calibration=args.calibration,
            ignore_memory=args.ignore_memory,
        ),
    )
    is_auto = args.precision == "auto"
    artifact = export_fastest(options, args.optimize_for or "latency") if is_auto else export_model(options)
    if (choice := read_choice(artifact)) is not None:
        sys.stdout.write("\n".join(choice_lines(choice)) + "\n")
    for check in artifact.receipt["checks"]:
        sign = "<=" if check["at_most"] else ">="
        mark = "ok" if check["passed"] else "FAILED"
        sys.stdout.write(f"  {check['figure']:32}{check['value']:<12.4g}{sign} {check['limit']:<10g}{mark}\n")
    total = sum(entry.size for entry in artifact.manifest.files.values())
    sys.stdout.write(f"{out}: {artifact.manifest.name}, {described(artifact.manifest)}, {total / 1e6:,.0f} MB\n")
    return 0


def _limits(texts: Sequence[str]) -> dict[str, float]:
    """`kl=0.01` each."""
    limits = {}
    for text in texts:
        figure, _, limit = text.partition("=")
        try:
            limits[figure] = float(limit)
        except ValueError:
            raise InvalidSetting(f"--gate {text!r} is not FIGURE=LIMIT, such as kl=0.01") from None
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


def _is_good(out: Path) -> bool:
    from runtime.artifact import open_artifact
    from runtime.errors import InvalidArtifact

    try:
        open_artifact(out, check_hashes=False)
    except InvalidArtifact:
        return False
    return True
