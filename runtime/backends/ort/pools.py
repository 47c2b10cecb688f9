"""The KV pool of a session on ONNX Runtime, in the host's memory or in a device's, behind one interface.

For each layer with attention one K and one V array `[num_slots, kv_heads, slot_len, head_dim]`, for each state of a
recurrent layer one array `[num_slots, ...]`. A run reads and writes the same
memory: a graph's cache output is bound to where its input is. Knows no requests and no text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import CacheNames, StateTensor
from runtime.backends.cuda.rows import RowCopier, RowStage
from runtime.machine.kv_pages import LazyArrays
from runtime.session.host_rows import HostRows


class PoolShape(NamedTuple):
    """The sizes of every cache tensor."""

    num_slots: int
    kv_heads: int
    slot_len: int
    head_dim: int


class Pool(Protocol):
    """What a session on ONNX Runtime asks of its KV cache."""

    def bind(self, binding: Any, first_slot: int, num_rows: int) -> None:
        """Bind the memory of these slots to the cache inputs and outputs of an IO binding."""
        ...

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of a slot to another."""
        ...

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """A copy of positions of a slot."""
        ...

    def write_slot(self, slot: int, start: int, rows: HostRows) -> None:
        """Put such a copy into a slot, from position `start` on."""
        ...

    def drop_slot(self, slot: int) -> None:
        """Forget what a slot holds; see `Session.drop_slot`."""
        ...

    def free(self) -> None:
        """Give the memory back. Idempotent."""
        ...


class HostPool:
    """The pool in the host's memory, which is committed page by page as tokens are written, and given back by slot.

    A slot's length must fill whole pages (`aligned_len`)."""

    def __init__(
        self, names: Sequence[CacheNames], shape: PoolShape, dtype: str, states: Sequence[StateTensor] = ()
    ) -> None:
        from onnxruntime import OrtValue

        self._value = OrtValue.ortvalue_from_numpy
        self._memory = LazyArrays(len(names), shape, dtype)
        self._states = [np.zeros((shape.num_slots, *state.shape), np.float32) for state in states]
        self._all_names = [*names, *(CacheNames(state.past, state.present) for state in states)]

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """The whole pool, an array for each cache tensor."""
        return self._memory.arrays

    def bind(self, binding: Any, first_slot: int, num_rows: int) -> None:
        for names, array in zip(self._all_names, [*self.arrays, *self._states], strict=True):
            value = self._value(array[first_slot : first_slot + num_rows])
            binding.bind_ortvalue_input(names.past, value)
            binding.bind_ortvalue_output(names.present, value)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        for array in self.arrays:
            array[target, :, :num_tokens] = array[source, :, :num_tokens]
        for state in self._states:
            state[target] = state[source]

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        return HostRows([array[slot, :, start:stop].copy() for array in self.arrays])

    def write_slot(self, slot: int, start: int, rows: HostRows) -> None:
        for array, part in zip(self.arrays, rows.arrays, strict=True):
            array[slot, :, start : start + part.shape[1]] = part

    def read_states(self, slot: int) -> HostRows:
        """A copy of a slot's states."""
        return HostRows([state[slot].copy() for state in self._states])

    def write_states(self, slot: int, rows: HostRows) -> None:
        """Put such a copy into a slot."""
        for state, copied in zip(self._states, rows.arrays, strict=True):
            state[slot] = copied

    def drop_slot(self, slot: int) -> None:
        self._memory.drop_slot(slot)

    def free(self) -> None:
        self._memory.free()
        self._states.clear()


class DeviceCopier(RowCopier, Protocol):
    """Copies on the device, and between it and the host; `runtime.backends.cuda.cuda.Cuda` is one."""

    def copy_rows(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None: ...
    def close(self) -> None: ...


class DevicePool:
    """The pool in a device's memory. Closes the copier with itself.

    device: as ONNX Runtime names it, like `cuda`
    """

    def __init__(
        self, names: Sequence[CacheNames], shape: PoolShape, dtype: str, *, device: str, copier: DeviceCopier
    ) -> None:
        from onnxruntime import OrtValue

        self._names, self._device, self._copier = names, device, copier
        self._dtype, self._tail = np.dtype(dtype), shape[1:]
        self._row_bytes = shape.head_dim * self._dtype.itemsize
        self._head_bytes = shape.slot_len * self._row_bytes
        self._slot_bytes = shape.kv_heads * self._head_bytes
        self._stage = RowStage(copier, kv_heads=shape.kv_heads, head_bytes=self._head_bytes, row_bytes=self._row_bytes)
        self._values = [OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), device, 0) for _ in names]

    def bind(self, binding: Any, first_slot: int, num_rows: int) -> None:
        shape = [num_rows, *self._tail]
        for names, address in zip(self._names, self._addresses(first_slot), strict=True):
            binding.bind_input(names.past, self._device, 0, self._dtype.type, shape, address)
            binding.bind_output(names.present, self._device, 0, self._dtype.type, shape, address)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        for old, new in zip(self._addresses(source), self._addresses(target), strict=True):
            self._copier.copy_rows(
                new, old, pitch=self._head_bytes, width=num_tokens * self._row_bytes, num_rows=self._tail[0]
            )
        self._copier.synchronize()  # ONNX Runtime runs on a stream of its own

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        return self._stage.read(self._addresses(slot), start, stop)

    def write_slot(self, slot: int, start: int, rows: HostRows) -> None:
        self._stage.write(self._addresses(slot), start, rows)

    def drop_slot(self, slot: int) -> None:
        """The pool was allocated whole and stays so."""

    def free(self) -> None:
        self._stage.free()
        self._values.clear()
        self._copier.close()

    def _addresses(self, slot: int) -> list[int]:
        """Where the slot lies in every cache tensor."""
        return [value.data_ptr() + slot * self._slot_bytes for value in self._values]
