"""`headrace export`: flags in, one artifact out."""

import argparse
import sys
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
    parser.add_argument("--out", type=Path, help="artifact directory; default: artifacts/NAME-PRECISION")
    parser.add_argument(
        "--optimize-for", choices=("latency", "throughput"), help="what --precision auto measures; default: latency"
    )
    parser.add_argument("--max-len", type=int, help="longest sequence in tokens; default: the model's, at most 32768")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    calibration = parser.add_argument_group("calibration, for the precisions that need it")
    calibration.add_argument(
        "--calib",
        metavar="SOURCE",
        help="built-in, self, a .jsonl/.txt/.parquet file, or a dataset id; default: built-in",
    )
    calibration.add_argument("--calib-samples", type=int, metavar="N", help="sequences; default: 128")
    calibration.add_argument("--calib-length", type=int, metavar="N", help="tokens of a sequence; default: 512")
    parser.add_argument("--force", action="store_true", help="write the artifact even if it fails its accuracy gate")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if --out is already a good artifact")
    return parser


def main(argv: list[str]) -> int:
    """Export; prints the receipt's figures and where the artifact is."""
    args = _parser().parse_args(argv)
    out = args.out or Path("artifacts") / f"{Path(args.model).stem.lower()}-{args.precision}"
    if args.if_missing and _is_good(out):
        sys.stdout.write(f"{out} is there already\n")
        return 0
    if args.optimize_for is not None and args.precision != "auto":
        raise InvalidSetting(f"--optimize-for is for --precision auto; {args.precision} is chosen already")
    from export.calibration_set import calibration_options
    from export.choose_precision import export_fastest
    from export.pipeline import ExportOptions, export_model
    from runtime.choice import choice_lines, read_choice

    options = ExportOptions(
        model=args.model,
        out=out,
        precision=args.precision,
        max_len=args.max_len,
        revision=args.revision,
        force=args.force,
        calib=calibration_options(args.precision, args.calib, args.calib_samples, args.calib_length),
        dialects=tuple(dict.fromkeys(part.strip() for part in args.dialect.split(","))),
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
    sys.stdout.write(f"{out}: {artifact.manifest.name}, {artifact.manifest.precision}, {total / 1e6:,.0f} MB\n")
    return 0


def _is_good(out: Path) -> bool:
    from runtime.artifact import open_artifact
    from runtime.errors import InvalidArtifact

    try:
        open_artifact(out, check_hashes=False)
    except InvalidArtifact:
        return False
    return True
