"""K and V of some positions of a slot, copied into the host's memory."""

from typing import Any, NamedTuple

from numpy.typing import NDArray


class HostRows(NamedTuple):
    """A `KvRows` in plain memory: one array `[kv_heads, positions, ...]` for each of the pool's."""

    arrays: list[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)
