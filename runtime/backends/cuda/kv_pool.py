"""The KV pool in device memory: for each layer one K and one V array `[num_slots, kv_heads, slot_len, head_dim]`.

Where the graph writes its cache in place, a cache's input and output are one address. Where it does not (the
`trt-plain` dialect), outputs go to a second pool and are copied back after the run. Knows addresses, not models.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

from runtime.artifact.manifest import CacheNames
from runtime.backends.cuda.cuda import ALIGNMENT, Cuda
from runtime.backends.cuda.rows import RowStage
from runtime.session.host_rows import HostRows


class CacheAddresses(NamedTuple):
    """Where one cache tensor lies for a run, as input and as output."""

    names: CacheNames
    past: int
    present: int


def slot_unit(token_bytes: int) -> int:
    """Tokens that a slot's length must be a multiple of, so that every slot begins at an aligned address.

    token_bytes: of one cache tensor, kv_heads * head_dim * item size
    """
    return ALIGNMENT // gcd(ALIGNMENT, token_bytes)


class DeviceKv:
    """Owns the pool. Free it with `free`."""

    def __init__(
        self,
        cuda: Cuda,
        names: Sequence[CacheNames],
        *,
        num_slots: int,
        kv_heads: int,
        slot_len: int,
        head_dim: int,
        item_bytes: int,
        in_place: bool,
    ) -> None:
        self._cuda, self._names = cuda, list(names)
        self.tail_shape = (kv_heads, slot_len, head_dim)
        self._row_bytes = head_dim * item_bytes
        self._head_bytes = slot_len * self._row_bytes
        self._slot_bytes = kv_heads * self._head_bytes
        assert self._slot_bytes % ALIGNMENT == 0, "slots at unaligned addresses"
        self._tensor_bytes = num_slots * self._slot_bytes
        total = len(self._names) * self._tensor_bytes
        self._stage = RowStage(cuda, kv_heads=kv_heads, head_bytes=self._head_bytes, row_bytes=self._row_bytes)
        self._pool = cuda.allocate(total, "the KV cache")
        self._outputs = self._pool
        if not in_place:
            try:
                self._outputs = cuda.allocate(total, "the KV cache's outputs")
            except BaseException:
                self._pool.free()
                raise
        # The mask hides what is not written yet, but a NaN there would come through: 0 * NaN is NaN.
        cuda.clear(self._pool.address, total)

    @property
    def is_in_place(self) -> bool:
        return self._outputs is self._pool

    def addresses(self, first_slot: int) -> Iterator[CacheAddresses]:
        """Every cache tensor of a run whose first row is `first_slot`."""
        for idx, names in enumerate(self._names):
            past = self._pool.address + idx * self._tensor_bytes + first_slot * self._slot_bytes
            present = past if self.is_in_place else self._outputs.address + idx * self._tensor_bytes
            yield CacheAddresses(names, past, present)

    def take_outputs(self, first_slot: int, num_rows: int) -> None:
        """Enqueue, after a run, the copy of its outputs into the pool."""
        if not self.is_in_place:
            for cache in self.addresses(first_slot):
                self._cuda.copy_within(cache.past, cache.present, num_rows * self._slot_bytes)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a slot: of each head a stretch, the heads lying a slot length apart."""
        if num_tokens == 0:
            return
        for old, new in zip(self.addresses(source), self.addresses(target), strict=True):
            self._cuda.copy_rows(
                new.past,
                old.past,
                pitch=self._head_bytes,
                width=num_tokens * self._row_bytes,
                num_rows=self.tail_shape[0],
            )

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """Copy positions of a slot to the host; waits for the device."""
        return self._stage.read([cache.past for cache in self.addresses(slot)], start, stop)

    def write_slot(self, slot: int, start: int, rows: HostRows) -> None:
        """Put them into a slot; waits for the device."""
        self._stage.write([cache.past for cache in self.addresses(slot)], start, rows)

    def free(self) -> None:
        """Give the memory back. Idempotent."""
        self._stage.free()
        self._outputs.free()
        self._pool.free()
