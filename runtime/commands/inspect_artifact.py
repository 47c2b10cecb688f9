"""`headrace inspect`: what an artifact is, read from its manifest, receipt and choice alone; loads no model."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from runtime.artifact.choice import choice_lines, read_choice
from runtime.artifact.json_shape import finite
from runtime.artifact.manifest import CALIBRATION, WITHOUT_CUTS, Artifact, Manifest, open_artifact
from runtime.artifact.shapes import read_calibration_account
from runtime.commands.sensitivity_picture import sensitivity_lines
from runtime.machine.sizes import format_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace inspect", description="Show the dimensions, precision, files and receipt of an artifact."
    )
    parser.add_argument("artifact", help="directory written by `headrace export`")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead")
    return parser


def main(argv: list[str]) -> int:
    """Print the artifact for people, or as one JSON line. Artifacts that failed their gate are shown as well."""
    args = _parser().parse_args(argv)
    artifact = open_artifact(args.artifact, allow_failed=True)
    text = json.dumps(as_json(artifact), allow_nan=False) if args.json else "\n".join(as_lines(artifact))
    sys.stdout.write(text + "\n")
    return 0


def num_parameters(artifact: Artifact) -> int:
    """Weights of the matrices; a tied embedding counts once. Norms and biases are left out.

    For an artifact that does not say, they are computed from the dimensions, as those of a decoder like Llama.
    """
    if artifact.manifest.num_parameters is not None:
        return artifact.manifest.num_parameters
    dims = artifact.manifest.dims
    attention = dims.hidden_size * dims.head_dim * 2 * (dims.num_heads + dims.num_kv_heads)
    mlp = 3 * dims.hidden_size * dims.intermediate_size
    heads = 1 if artifact.manifest.is_tied else 2
    return dims.num_layers * (attention + mlp) + heads * dims.vocab_size * dims.hidden_size


def as_json(artifact: Artifact) -> dict[str, Any]:
    """Manifest, receipt and what follows from them."""
    return {
        "path": str(artifact.path),
        "passed": artifact.passed,
        "parameters": num_parameters(artifact),
        "kv_bytes_per_token": artifact.kv_bytes_per_token(),
        "kv_bytes_per_slot": artifact.kv_bytes_per_token() * artifact.manifest.dims.max_len,
        "manifest": asdict(artifact.manifest),
        "receipt": finite(dict(artifact.receipt)),
        "choice": read_choice(artifact),
    }


def quantization_lines(artifact: Artifact) -> Iterator[str]:
    """Where a calibrated artifact's ranges came from, and what each layer costs, as a picture."""
    if CALIBRATION not in artifact.manifest.files:
        return
    calibration = read_calibration_account(artifact.path / CALIBRATION)
    found, origin = artifact.receipt.get("quantization", {}), calibration["provenance"]
    two_pass = found.get("two_pass", [])
    yield f"calibrated on {origin['source']}: {origin.get('num_sequences', '?')} sequences"
    if "two_pass_share" in found:
        yield f"  {found['two_pass_share']:.1%} of the multiply-adds in two int8 passes (LM head not counted)"
    for figure, words in (("layer_errors", ""), ("trt.layer_errors", " for TensorRT")):
        if errors := found.get(figure):
            # A figure that is not finite is text, and nothing is larger.
            sizes = {name: float(error) for name, error in errors.items()}
            worst = sorted(sizes.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)[:5]
            yield f"  largest output errors{words}: " + ", ".join(f"{name} {error:.2%}" for name, error in worst)
    if calibration["layers"]:
        yield from sensitivity_lines(calibration, two_pass)


def _cache_lines(artifact: Artifact) -> Iterator[str]:
    """What the cache of the `ort` graph takes, and that of the `native` one where it differs."""
    manifest = artifact.manifest
    for dialect in ("ort", "native"):
        kv, per_token = manifest.kv_of(dialect), artifact.kv_bytes_per_token(dialect)
        if dialect == "ort" or (dialect in manifest.dialects and kv.dtype != manifest.kv.dtype):
            scales = f", scales {kv.scales}" if kv.scales else ""
            of = "" if dialect == "ort" else f"{dialect}: "
            whole = format_bytes(per_token * manifest.dims.max_len)
            yield f"{of}{format_bytes(per_token)} a token, {whole} a full slot, {kv.dtype}{scales}"


def _state_rows(manifest: Manifest) -> dict[str, str]:
    """How large the states of a slot are, how many layers have attention, and what states switch off."""
    if not manifest.states:
        return {}
    num_layers, num_attention = manifest.dims.num_layers, len(manifest.dims.kv_layers)
    size = format_bytes(manifest.state_bytes)
    return {
        "recurrence": f"{size} of states in a slot; {num_attention} of {num_layers} layers have attention",
        "": WITHOUT_CUTS,
    }


def as_lines(artifact: Artifact) -> Iterator[str]:
    """The same for people."""
    manifest, dims, receipt = artifact.manifest, artifact.manifest.dims, artifact.receipt
    yield f"{manifest.name}  ({artifact.path})"
    rows = {
        "source": manifest.source + (f" at commit {manifest.commit}" if manifest.commit else ""),
        "precision": manifest.precision,
        "family": dims.model_type,
        "parameters": f"{num_parameters(artifact) / 1e6:,.1f} million",
        "layers": f"{dims.num_layers} of {dims.hidden_size} (MLP {dims.intermediate_size})",
        "attention": f"{dims.num_heads} heads of {dims.head_dim}, {dims.num_kv_heads} for keys and values",
        **_state_rows(manifest),
        "vocabulary": f"{dims.vocab_size:,}, ends at {', '.join(map(str, manifest.eos_ids)) or 'nothing'}",
        "longest": f"{dims.max_len:,} tokens",
        "KV cache": "; ".join(_cache_lines(artifact)),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    yield from (f"  {name:12}{value}" for name, value in rows.items())
    yield "files"
    for name, entry in manifest.files.items():
        yield f"  {name:28}{format_bytes(entry.size):>10}  sha256 {entry.sha256[:12]}"
    yield f"receipt: {'passed' if artifact.passed else 'FAILED'}, against {receipt.get('reference', 'nothing')}"
    for check in receipt.get("checks", []):
        bound = "at most" if check["at_most"] else "at least"
        value = check["value"] if isinstance(check["value"], str) else f"{check['value']:.4g}"
        mark = "ok" if check["passed"] else "FAILED"
        yield f"  {check['figure']:24}{value:>10}  {bound} {check['limit']:<8g}{mark:8}{check['reason']}"
    yield from quantization_lines(artifact)
    named = {check["figure"] for check in receipt.get("checks", [])}
    for figure, value in receipt.get("figures", {}).items():
        if figure not in named:
            yield f"  {figure:24}{value if isinstance(value, str) else f'{value:.4g}':>10}"
    if (choice := read_choice(artifact)) is not None:
        yield from choice_lines(choice)
