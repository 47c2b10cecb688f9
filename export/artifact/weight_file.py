"""Appends tensors to weight files, which the ONNX graphs refer to as external data.

Keeps no tensor after writing it, so a model larger than memory can be exported. A second graph can share the tensors of
an earlier one: bytes that are in the earlier file already are referred to there and not written again.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.artifact.manifest import WEIGHTS

PAGE = 4096  # a runtime can map a tensor into memory only where a page starts


class Extent(NamedTuple):
    """The place of a tensor's bytes: offset and length in a file."""

    offset: int
    length: int
    file: str = WEIGHTS


class WeightFile:
    """Appends tensors to `directory/name`; a context manager that closes the file, and removes it if empty.

    shares: an earlier file, opened with `is_shared`, whose tensors need not be written again
    is_shared: remember the hash of every tensor (blake2b; about a second per gigabyte)
    """

    def __init__(
        self, directory: Path, name: str = WEIGHTS, *, shares: "WeightFile | None" = None, is_shared: bool = False
    ) -> None:
        self._path = directory / name
        self._file = self._path.open("wb")
        self._known: dict[bytes, Extent] = dict(shares._known) if shares else {}
        self._is_hashed = is_shared or shares is not None

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_empty = not self._file.tell()
        self._file.close()
        if is_empty:
            self._path.unlink()

    @property
    def num_bytes(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Make appended bytes visible to other readers of the file."""
        self._file.flush()

    def append(self, chunks: Iterable[NDArray[Any]]) -> Extent:
        """Write arrays as one tensor that starts on a page. Returns the earlier place if the same bytes are there."""
        end = self._file.tell()
        self._file.write(b"\0" * (-end % PAGE))
        start = self._file.tell()
        digest = hashlib.blake2b(digest_size=20)
        for chunk in chunks:
            # As bytes: bfloat16 has no buffer format of its own.
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            self._file.write(data)
            if self._is_hashed:
                digest.update(data)
        extent = Extent(start, self._file.tell() - start, self._path.name)
        if not self._is_hashed:
            return extent
        same = self._known.setdefault(digest.digest(), extent)
        if same != extent:
            self._file.seek(end)
            self._file.truncate()
        return same


def external_value(name: str, extent: Extent, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """An initializer over bytes of a weight file. Several may name the same bytes with different shapes."""
    tensor = ir.ExternalTensor(extent.file, extent.offset, extent.length, dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
