"""Artifacts of tiny checkpoints: exported once and read by many tests, or changed after the export."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.calibration.dataset import CalibrationOptions
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.known_hashes import sha256_of
from runtime.artifact.manifest import MANIFEST, Artifact
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny.checkpoint import config_of, write_checkpoint

FEW_IDS = QuantizationOptions(text=CalibrationOptions(num_samples=8, length=64))
"""Calibration that takes a blink, for tests that look at something else."""


@dataclass(frozen=True)
class TinyExports:
    """Exports each tiny model once, below `root`. Tests read these artifacts; one that changes files copies them first.

    `changes` are of the variant's config.json.
    """

    root: Path
    _exported: dict[Path, Artifact] = field(default_factory=dict)

    def checkpoint(self, variant: str, *, has_tokenizer: bool = False, **changes: Any) -> Path:
        """The directory of a checkpoint, with the byte tokenizer if asked."""
        words = [variant, "tokenizer" * has_tokenizer, *(f"{name}={value}" for name, value in sorted(changes.items()))]
        directory = self.root / "-".join(filter(None, words))
        if not directory.exists():
            write_checkpoint(directory, config_of(variant, **changes))
            if has_tokenizer:
                write_byte_tokenizer(directory)
        return directory

    def artifact(
        self,
        variant: str,
        precision: str = "fp32",
        *,
        dialects: tuple[str, ...] = ("ort",),
        has_tokenizer: bool = False,
        max_len: int | None = None,
        **changes: Any,
    ) -> Artifact:
        """The artifact, written also if a gate fails, as random weights in few bits make it."""
        source = self.checkpoint(variant, has_tokenizer=has_tokenizer, **changes)
        out = source.with_name("_".join([source.name, precision, *dialects, f"to-{max_len}"]))
        if (known := self._exported.get(out)) is None:
            options = ExportOptions(
                model=str(source),
                out=out,
                precision=precision,
                dialects=dialects,
                max_len=max_len,
                quantization=FEW_IDS,
                force=True,
            )
            known = self._exported[out] = export_model(options)
        return known


def write_listed(artifact: Path, name: str, content: bytes) -> None:
    """Write a file and list it, as whoever made the artifact could have."""
    (artifact / name).write_bytes(content)
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(content), "sha256": sha256_of(artifact / name)}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
