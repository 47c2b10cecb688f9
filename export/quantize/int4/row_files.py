"""Keeps rounded matrices on disk, one file per linear layer, so that a model larger than memory can be rounded."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.model.description import Site
from export.quantize.statistics.store import load_arrays, save_arrays
from export.schemes.forms import Blocks
from export.storage.blocks import QuantizedRows
from export.storage.quantized_rows import ImportedRows


class RowFiles:
    """Quantized matrices by site, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, site: Site, rows: QuantizedRows, blocks: Blocks) -> None:
        """Write one matrix atomically."""
        arrays: dict[str, NDArray[Any]] = {
            "values": rows.values,
            "scales": rows.scales,
            "blocks": np.array([blocks.bits, blocks.block_size]),
        }
        if rows.zero_points is not None:
            arrays["zero_points"] = rows.zero_points
        save_arrays(self._file(site), arrays)

    def get(self, site: Site) -> ImportedRows | None:
        """Read one matrix; None if it was not rounded."""
        file = self._file(site)
        if not file.is_file():
            return None
        arrays = load_arrays(file)
        bits, block_size = map(int, arrays["blocks"])
        rows = QuantizedRows(arrays["values"], arrays["scales"], arrays.get("zero_points"))
        return ImportedRows(rows, Blocks(bits, block_size, symmetric=rows.zero_points is None), None)

    def _file(self, site: Site) -> Path:
        return self._directory / f"{site}.npz"
