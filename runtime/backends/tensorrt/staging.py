"""The small inputs and outputs of a run, in pinned host memory and on the device: one copy in, one copy out.

Tensors of a run lie one after another, each at an aligned offset, so that what is copied is only what the run has.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda.cuda import Cuda, aligned
from runtime.session.feeds import LOG_SUM, LOGITS, TOP_IDS, TOP_LOGITS
from runtime.session.session import TopRows


class Part(NamedTuple):
    """Where one tensor lies in a block."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any


class Block:
    """`num_bytes` in pinned memory and as much on the device."""

    def __init__(self, cuda: Cuda, num_bytes: int, what: str) -> None:
        self._cuda = cuda
        self._device = cuda.allocate(num_bytes, what)
        try:
            self._host = cuda.allocate_pinned(num_bytes, what)
        except BaseException:
            self._device.free()
            raise

    def address(self, part: Part) -> int:
        """On the device."""
        return self._device.address + part.offset

    def view(self, part: Part) -> NDArray[Any]:
        """On the host."""
        return self._host.view(part.dtype, part.shape, part.offset)

    def copy_in(self, parts: Iterable[Part]) -> None:
        """Put on the stream: host to device, up to the end of the last part."""
        self._cuda.copy_in(self._device.address, self._host.address, _end(parts))

    def copy_out(self, parts: Iterable[Part]) -> None:
        """Put on the stream: device to host."""
        self._cuda.copy_out(self._host.address, self._device.address, _end(parts))

    def free(self) -> None:
        """Give the memory back. Idempotent."""
        self._device.free()
        self._host.free()


def layout(tensors: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, Part]:
    """Lay tensors, by name (shape, dtype), one after another."""
    parts, offset = {}, 0
    for name, (shape, dtype) in tensors.items():
        parts[name] = Part(offset, shape, dtype)
        offset = aligned(_end([parts[name]]))
    return parts


def _end(parts: Iterable[Part]) -> int:
    """The offset of the first byte after the last of them."""
    return max(part.offset + math.prod(part.shape) * int(np.dtype(part.dtype).itemsize) for part in parts)


class RunInputs:
    """Token ids, positions, write places and wanted logits, all int64."""

    def __init__(self, cuda: Cuda, *, max_tokens: int, max_rows: int, max_logits: int) -> None:
        sizes = (max_tokens, max_tokens, max_rows, max_logits)
        self._block = Block(cuda, sum(aligned(8 * size) for size in sizes), "inputs")

    def put(self, inputs: Mapping[str, NDArray[np.int64]]) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Put a run's inputs on the stream; the device address and shape of each.

        The host's copy is written here: the run before must have been waited for.
        """
        parts = layout({name: (array.shape, np.int64) for name, array in inputs.items()})
        for name, array in inputs.items():
            self._block.view(parts[name])[...] = array
        self._block.copy_in(parts.values())
        return {name: (self._block.address(part), part.shape) for name, part in parts.items()}

    def free(self) -> None:
        """Give the memory back. Idempotent."""
        self._block.free()


class RunOutputs:
    """Logits float32 `[R, vocab_size]`, and apart from them their `num_top` largest; either is copied if asked for."""

    def __init__(self, cuda: Cuda, *, max_logits: int, vocab_size: int, num_top: int) -> None:
        self.max_logits, self._vocab_size, self._num_top = max_logits, vocab_size, num_top
        self._rows = Block(cuda, max_logits * vocab_size * 4, "logits")
        try:
            last = list(self._top_parts(max_logits).values())
            self._top = Block(cuda, aligned(_end(last)), "the most likely tokens")
        except BaseException:
            self._rows.free()
            raise

    def addresses(self, num_logits: int) -> dict[str, int]:
        """Where the graph puts the outputs of a run with so many wanted logits."""
        assert num_logits <= self.max_logits, "more logits than there is room for"
        top = {name: self._top.address(part) for name, part in self._top_parts(num_logits).items()}
        return {LOGITS: self._rows.address(self._rows_part(num_logits)), **top}

    def copy_rows(self, num_logits: int) -> NDArray[np.float32]:
        """Put the copy of whole rows on the stream; they are in the array returned after `synchronize`."""
        part = self._rows_part(num_logits)
        self._rows.copy_out([part])
        return self._rows.view(part)

    def copy_top(self, num_logits: int, num_wanted: int) -> "TopViews":
        """Put the copy of the most likely tokens on the stream; `num_wanted` of the rows are returned."""
        parts = self._top_parts(num_logits)
        self._top.copy_out(parts.values())
        return TopViews(*(self._top.view(part)[:num_wanted] for part in parts.values()))

    def free(self) -> None:
        """Give the memory back. Idempotent."""
        self._rows.free()
        self._top.free()

    def _rows_part(self, num_logits: int) -> Part:
        return Part(0, (num_logits, self._vocab_size), np.float32)

    def _top_parts(self, num_logits: int) -> dict[str, Part]:
        shape = (num_logits, self._num_top)
        return layout(
            {TOP_LOGITS: (shape, np.float32), TOP_IDS: (shape, np.int64), LOG_SUM: ((num_logits, 1), np.float32)}
        )


class TopViews(NamedTuple):
    """Views of pinned memory: their content is there after `synchronize`."""

    logits: NDArray[np.float32]
    ids: NDArray[np.int64]
    log_sum: NDArray[np.float32]  # [R, 1]

    def rows(self) -> TopRows:
        """Call it after `synchronize`."""
        return TopRows(self.logits, self.ids, self.log_sum[:, 0])
