"""What a server tells about an artifact: where it came from, its precision, and its receipt in short."""

import math
from typing import Any

from runtime.artifact.manifest import Artifact


def model_card(artifact: Artifact) -> dict[str, Any]:
    """Plain JSON. Figures that are not finite are left out: JSON cannot express them."""
    manifest, dims = artifact.manifest, artifact.manifest.dims
    return {
        "source": manifest.source,
        "precision": manifest.precision,
        "family": dims.model_type,
        "context_length": dims.max_len,
        "vocab_size": dims.vocab_size,
        "weight_bytes": sum(entry.size for name, entry in manifest.files.items() if name.endswith((".bin", ".onnx"))),
        "receipt": {
            "passed": artifact.passed,
            "reference": str(artifact.receipt.get("reference", "")),
            "checks": [
                {"figure": check["figure"], "value": check["value"], "limit": check["limit"], "passed": check["passed"]}
                for check in artifact.receipt.get("checks", [])
                if isinstance(check["value"], int | float) and math.isfinite(check["value"])
            ],
        },
    }
