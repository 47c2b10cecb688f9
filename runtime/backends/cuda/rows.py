"""Copies K and V of some positions of a slot between a device's cache and the host, through pinned memory."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda.cuda import PinnedMemory
from runtime.session.host_rows import HostRows


class RowCopier(Protocol):
    """Copies between a device and pinned memory; `runtime.backends.cuda.cuda.Cuda` is one."""

    def allocate_pinned(self, num_bytes: int, what: str) -> PinnedMemory: ...
    def copy_rows_out(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None: ...
    def copy_rows_in(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None: ...
    def synchronize(self) -> None: ...


class RowStage:
    """Copies positions of a slot out of a device's cache and into it, through pinned memory that it keeps.

    kv_heads: rows of a cache tensor's slot, `head_bytes` apart
    row_bytes: of one position of one head
    """

    def __init__(self, copier: RowCopier, *, kv_heads: int, head_bytes: int, row_bytes: int) -> None:
        self._copier, self._kv_heads = copier, kv_heads
        self._head_bytes, self._row_bytes = head_bytes, row_bytes
        self._memory: PinnedMemory | None = None

    def read(self, slots: Sequence[int], start: int, stop: int) -> HostRows:
        """slots: the device address of the slot in every cache tensor. Waits for the device."""
        stage, width = self._views(len(slots), stop - start), (stop - start) * self._row_bytes
        for slot, view in zip(slots, stage, strict=True):
            self._copier.copy_rows_out(
                view.ctypes.data,
                slot + start * self._row_bytes,
                pitch=self._head_bytes,
                width=width,
                num_rows=self._kv_heads,
            )
        self._copier.synchronize()
        return HostRows([view.copy() for view in stage])

    def write(self, slots: Sequence[int], start: int, rows: HostRows) -> None:
        """Put rows into a slot from position `start` on. Waits for the device."""
        num = rows.arrays[0].shape[1]
        stage = self._views(len(slots), num)
        for slot, view, array in zip(slots, stage, rows.arrays, strict=True):
            view[...] = array
            self._copier.copy_rows_in(
                slot + start * self._row_bytes,
                view.ctypes.data,
                pitch=self._head_bytes,
                width=num * self._row_bytes,
                num_rows=self._kv_heads,
            )
        self._copier.synchronize()  # the next call writes to the pinned memory again

    def free(self) -> None:
        """Give the memory back. Idempotent."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def _views(self, num_tensors: int, positions: int) -> NDArray[np.uint8]:
        """Bytes `[tensors, kv_heads, positions, row]` in pinned memory, which grows to the largest size asked for."""
        shape = (num_tensors, self._kv_heads, positions, self._row_bytes)
        num_bytes = int(np.prod(shape))
        if self._memory is None or self._memory.num_bytes < num_bytes:
            self.free()
            self._memory = self._copier.allocate_pinned(num_bytes, "rows of the KV cache on their way")
        return self._memory.view(np.uint8, shape)
