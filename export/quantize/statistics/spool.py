"""Keeps the hidden states of all calibration sequences on disk, for two layers at a time.

There are two files: one is read while the next layer's states are written to the other. After an interruption, the
states of the last complete layer are still there.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class HiddenSpool:
    """float32 `[tokens, hidden]`, end to end, in `directory`."""

    def __init__(self, directory: Path, hidden_size: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._hidden_size = directory, hidden_size

    def read(self, layer: int, start: int, stop: int) -> Array:
        """Read the hidden states that enter `layer`, rows start .. stop."""
        count, offset = (stop - start) * self._hidden_size, start * self._hidden_size * 4
        return np.fromfile(self._file(layer), np.float32, count, offset=offset).reshape(-1, self._hidden_size)

    def append(self, layer: int, rows: Array, *, is_first: bool) -> None:
        """Write hidden states that enter `layer`, chunk after chunk; the first chunk truncates the file."""
        with self._file(layer).open("wb" if is_first else "ab") as file:
            file.write(np.ascontiguousarray(rows).data)

    def _file(self, layer: int) -> Path:
        return self._directory / f"hidden-{layer % 2}.bin"
