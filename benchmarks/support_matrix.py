"""Which family of models runs in which precision on which device: the table in README.md.

usage: python -m benchmarks.support_matrix [--run] [--family llama,gpt2]

Prints the table from benchmarks/support_matrix.json. With --run it first exports a tiny random model of each family in
each precision, builds a TensorRT plan of it, runs it on every device that works here, and updates the file. What was
recorded of devices that do not work here stays. Half a minute for each family on two cores.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

import headrace
from export.model.families.architectures import parse_config
from export.model.families.table import ARCHITECTURES
from export.schemes.registry import SCHEMES
from runtime.artifact.manifest import open_artifact
from runtime.backends.registry import BACKENDS
from runtime.native.library import is_built
from tests.support.tiny.architectures import BEYOND_LLAMA, RandomCheckpoint
from tests.support.tiny.checkpoint import VARIANTS, config_of

RECORD = Path(__file__).with_suffix(".json")
DIALECT_OF = {backend.name: backend.dialects[0] for backend in BACKENDS}
"""The graph that each device reads."""
MAX_KL = 0.25
"""Nats between the exported graph and the reference. Rounding random weights of width 64 to 4 bits costs about 0.1, an
unrelated model is 1.0 away."""
LEGEND = """\
**run**: on this device, with the tokens of the receipt. **plan built**: TensorRT-RTX compiled it without a GPU, and the
graph gives the reference's logits on ONNX Runtime's CPU. **graph tested**: only the latter. **refused**: the device
works, and refuses this. **not run**: not tried. A dash: the precision has no graph for the device."""

Facts = dict[str, list[str]]
"""Of one family in one precision: `graphs`, the dialects that gave the reference's logits; `plans`, those that
TensorRT-RTX compiled; `tried`, devices that worked where this was tried; `devices`, those that gave the receipt's
tokens."""
Record = dict[str, Facts]
"""By family and precision, with a space between."""


def cell(facts: Mapping[str, Sequence[str]], precision: str, device: str) -> str:
    """How far one family got in one precision on one device."""
    dialect = DIALECT_OF[device]
    if SCHEMES[precision].storage_of(dialect) is None:
        return "-"
    if device in facts.get("devices", ()):
        return "run"
    if device in facts.get("tried", ()):
        return "refused"
    if device == "tensorrt" and dialect in facts.get("plans", ()):
        return "plan built"
    return "graph tested" if dialect in facts.get("graphs", ()) else "not run"


def table(record: Mapping[str, Facts]) -> str:
    """The table in Markdown. Families with the same cells share their rows, precisions with the same cells a row."""
    groups: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}
    for family in ARCHITECTURES:
        rows: dict[tuple[str, ...], list[str]] = {}
        for precision in SCHEMES:
            facts = record.get(f"{family} {precision}", {})
            rows.setdefault(tuple(cell(facts, precision, device) for device in DIALECT_OF), []).append(precision)
        key = tuple((", ".join(f"`{name}`" for name in names), cells) for cells, names in rows.items())
        groups.setdefault(key, []).append(family)
    head = ["family", "precision", *(f"`{device}`" for device in DIALECT_OF)]
    lines = [head, ["---"] * len(head)]
    for rows_of_group, families in groups.items():
        names = [", ".join(families), *[""] * (len(rows_of_group) - 1)]
        lines += [[name, precisions, *cells] for name, (precisions, cells) in zip(names, rows_of_group, strict=True)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", LEGEND])


def run(families: Sequence[str], record: Record) -> None:
    """Try every combination of these families and write what was found, after each of them."""
    devices = [device for device in DIALECT_OF if headrace.main(["doctor", "--require", device]) == 0]
    for family in families:
        with tempfile.TemporaryDirectory() as work:
            source = _write_checkpoint(Path(work) / family, family)
            for precision in SCHEMES:
                facts = _kept(record.get(f"{family} {precision}", {}), devices)
                for fact, name in _found(source, precision, devices):
                    facts[fact] = sorted({*facts.get(fact, ()), name})
                record[f"{family} {precision}"] = facts
                sys.stderr.write(f"{family} {precision}: {facts}\n")
                lines = (f"{json.dumps(key)}: {json.dumps(record[key], sort_keys=True)}" for key in sorted(record))
                RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _kept(facts: Facts, usable: Sequence[str]) -> Facts:
    """What this machine cannot find out again: of other devices, and of plans where TensorRT-RTX is not installed."""
    kept = {fact: [name for name in facts.get(fact, ()) if name not in usable] for fact in ("tried", "devices")}
    if find_spec("tensorrt_rtx") is None:
        kept["plans"] = facts.get("plans", [])
    return {fact: names for fact, names in kept.items() if names}


def _write_checkpoint(path: Path, family: str) -> Path:
    """A tiny random checkpoint in the family's layout, with the sizes that every precision takes."""
    config = _TINY[family]
    random = RandomCheckpoint(parse_config(config))
    tensors = {name: random.load(name) for name in random.tensors}
    turned = _TRANSPOSED if family == "gpt2" else ()
    stored = {name: array.T.copy() if name.endswith(turned) else array for name, array in tensors.items()}
    path.mkdir()
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


_SIZES = {"intermediate_size": 128}
_TRANSPOSED = ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""GPT-2's matrices, which checkpoints hold as `[inputs, outputs]`."""
_TINY: Mapping[str, dict[str, Any]] = {
    **{family: {**config_of(family), **_SIZES} for family in ARCHITECTURES if family in VARIANTS},
    **{raw["model_type"]: raw for raw in BEYOND_LLAMA.values()},
    **{family: raw for family, raw in BEYOND_LLAMA.items() if family in ARCHITECTURES},
}
"""By family, a tiny configuration that every precision takes."""
assert set(ARCHITECTURES) <= set(_TINY), "every family has a tiny model"


def _found(source: Path, precision: str, usable: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What works of one checkpoint in one precision: pairs of a key of Facts and a name."""
    out = source.with_name("artifact")
    names = ("ort", "native", "trt") if is_built() else ("ort", "trt")
    dialects = [name for name in names if SCHEMES[precision].storage_of(name) is not None]
    options = ["--precision", precision, "--out", str(out), "--force", "--replace"]
    if SCHEMES[precision].calibration is not None:
        options += ["--calibration-samples", "8", "--calibration-length", "48", "--ignore-memory"]
    devices = [name for name in usable if DIALECT_OF[name] in dialects]
    yield from (("tried", device) for device in devices)
    if headrace.main(["export", str(source), "--dialect", ",".join(dialects), *options]):
        dialects = [name for name in dialects if name != "native"]  # the one that may lack an operation
        if headrace.main(["export", str(source), "--dialect", ",".join(dialects), *options]):
            return
    figures = open_artifact(out, allow_failed=True).receipt["figures"]
    for dialect in dialects:
        if figures["kl" if dialect == "ort" else f"{dialect}.kl"] < MAX_KL:
            yield "graphs", dialect
    if "trt" in dialects:
        limits = ["--max-batch", "4", "--prefill-chunk", "16", "--max-len", "64"]
        if headrace.main(["engine", str(out), "--allow-failed", *limits]) == 0:
            yield "plans", "trt"
    for device in devices:
        if headrace.main(["verify", str(out), "--allow-failed", "--device", device]) == 0:
            yield "devices", device
    shutil.rmtree(out)


def main() -> None:
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description="The table of families, precisions and devices in README.md.")
    parser.add_argument("--run", action="store_true", help="try all combinations on this machine first")
    parser.add_argument("--family", default=",".join(ARCHITECTURES), help="families to try, comma-separated")
    args = parser.parse_args()
    record: Record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if args.run:
        with contextlib.redirect_stdout(sys.stderr):
            run(args.family.split(","), record)
    sys.stdout.write(table(record) + "\n")


if __name__ == "__main__":
    main()
