"""Reads a byte range of a file as float32, piece by piece.

Knows no format: the caller gives the offset and a function that decodes stored bytes. Numbers that are not finite are
refused here, while their piece is in the processor's cache. Plain reads, not a memory map: mapped pages count as
resident memory, to a container's limit too, so the process would look as large as the file.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InvalidCheckpoint

Decode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

CHUNK_BYTES = 1 << 20
"""Bytes of the file held at a time. Decoding makes several copies of a chunk; they should fit the cache."""


def read_float32(
    file: Path,
    *,
    name: str,
    offset: int,
    num_bytes: int,
    shape: tuple[int, ...],
    block_bytes: int,
    decode: Decode,
    first_row: int = 0,
) -> NDArray[np.float32]:
    """Read `num_bytes` at `offset` and return them decoded, float32 `shape`. `name` is the tensor's, and `first_row`
    the number of the first row, for errors.

    `decode` gets whole blocks of `block_bytes` (the smallest unit of the stored type: an element, or a block
    of a quantized type) and returns all their values, in any shape. Peak memory is the result plus a few
    chunks. Raises InvalidCheckpoint if the file ends early or cannot be read, or holds NaN or infinity.
    """
    result = np.empty(math.prod(shape), dtype=np.float32)
    chunk_bytes = max(1, CHUNK_BYTES // block_bytes) * block_bytes
    buffer = np.empty(min(chunk_bytes, num_bytes), dtype=np.uint8)
    filled = 0
    try:
        with file.open("rb", buffering=0) as handle:
            handle.seek(offset)
            for start in range(0, num_bytes, chunk_bytes):
                piece = buffer[: min(chunk_bytes, num_bytes - start)]
                _fill(piece, handle.readinto, file, offset + start)
                values = decode(piece).reshape(-1)
                if not np.isfinite(values).all():
                    raise _not_finite(values, filled, file, name, shape, first_row)
                result[filled : filled + values.size] = values
                filled += values.size
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror or error}") from error
    assert filled == result.size, f"{file}: decoded {filled} values for shape {shape}"
    return result.reshape(shape)


def _not_finite(
    values: NDArray[np.float32], start: int, file: Path, name: str, shape: tuple[int, ...], first_row: int
) -> InvalidCheckpoint:
    """The error for the first value of a piece that is NaN or infinite; the piece begins at element `start`."""
    first = int(np.argmin(np.isfinite(values)))
    place = [int(index) for index in np.unravel_index(start + first, shape)]
    place[:1] = [index + first_row for index in place[:1]]
    return InvalidCheckpoint(
        f"{file}: tensor {name!r} holds {values[first]} at {place}; every output would be wrong. Download it again, or "
        "use another checkpoint: this one was broken when it was trained or saved"
    )


def _fill(piece: NDArray[np.uint8], readinto: Callable[[memoryview], int], file: Path, at: int) -> None:
    view = piece.data
    while view:
        count = readinto(view)
        if not count:
            raise InvalidCheckpoint(
                f"{file} is truncated: it ends at byte {at + piece.size - len(view):,} and "
                f"{len(view):,} more belong here; download or copy it again"
            )
        view = view[count:]
