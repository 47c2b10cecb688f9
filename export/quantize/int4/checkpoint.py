"""A checkpoint whose linear layers calibration has rounded to blocks of integers.

To a graph it looks like one that a GPTQ tool has quantized (quantized_checkpoint.py): `imported` gives the integers of
the layers that were rounded, everything else is the checkpoint's own. Each matrix lies in a file of its own, so a model
larger than memory can be rounded.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView
from export.quantize.statistics.store import load_arrays, save_arrays
from export.storage.blocks import Blocks, QuantizedRows
from export.storage.quantized_rows import ImportedRows


class RowFiles:
    """Quantized matrices by tensor name, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, rows: QuantizedRows, blocks: Blocks) -> None:
        """Write one matrix; the file appears whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {
            "values": rows.values,
            "scales": rows.scales,
            "blocks": np.array([blocks.bits, blocks.block_size]),
        }
        if rows.zero_points is not None:
            arrays["zero_points"] = rows.zero_points
        save_arrays(self._file(name), arrays)

    def get(self, name: str) -> ImportedRows | None:
        """Read one matrix; None if it was not rounded."""
        file = self._file(name)
        if not file.is_file():
            return None
        arrays = load_arrays(file)
        bits, block_size = map(int, arrays["blocks"])
        rows = QuantizedRows(arrays["values"], arrays["scales"], arrays.get("zero_points"))
        return ImportedRows(rows, Blocks(bits, block_size, symmetric=rows.zero_points is None), None)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.npz"


class RoundedCheckpoint(CheckpointView):
    """A Checkpoint that has `imported`; `load` still gives the unrounded weights."""

    def __init__(self, checkpoint: Checkpoint, rows: RowFiles) -> None:
        super().__init__(checkpoint)
        self._rows = rows

    def imported(self, name: str) -> ImportedRows | None:
        return self._rows.get(name)
