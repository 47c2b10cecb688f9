"""weights.bin: every tensor of an artifact, appended one at a time, named from the graph as ONNX external data.

Holds no tensor after it is written, so that a model larger than memory can be exported.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.artifact import WEIGHTS

PAGE = 4096  # a runtime can map a tensor into memory only where a page starts


class Extent(NamedTuple):
    """Where a tensor's bytes lie in the file."""

    offset: int
    length: int


class WeightFile:
    """Appends tensors to `directory/weights.bin`; a context manager that closes the file."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / WEIGHTS).open("wb")

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def num_bytes(self) -> int:
        return self._file.tell()

    def append(self, chunks: Iterable[NDArray[Any]]) -> Extent:
        """Write arrays one after another as one tensor, starting on a page."""
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        start = self._file.tell()
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk).data)
        return Extent(start, self._file.tell() - start)


def external_value(name: str, extent: Extent, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """An initializer over bytes of weights.bin. Several may name the same bytes with different shapes."""
    tensor = ir.ExternalTensor(WEIGHTS, extent.offset, extent.length, dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
