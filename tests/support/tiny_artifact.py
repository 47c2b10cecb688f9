"""Artifacts for the tests: exported from tiny checkpoints, or changed after they were."""

import json
from pathlib import Path

from runtime.artifact.manifest import MANIFEST, sha256_of


def write_listed(artifact: Path, name: str, content: bytes) -> None:
    """Write a file and list it, as whoever made the artifact could have."""
    (artifact / name).write_bytes(content)
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(content), "sha256": sha256_of(artifact / name)}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
