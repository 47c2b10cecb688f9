"""Decode steps recorded as CUDA graphs, one for each batch bucket: a step costs one launch instead of hundreds.

A graph's addresses and shapes are fixed, so a batch is padded to its bucket with idle rows. An idle row writes one
token after those its slot holds; `SlotEnds` knows where that is. Each bucket has an execution context of its own:
changing the shapes of a context may move what graphs captured from it rely on.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda.cuda import CapturedGraph, Cuda
from runtime.backends.tensorrt.plan import ProfileContext
from runtime.session.session import Batch

log = logging.getLogger(__name__)


def buckets_up_to(num_slots: int) -> list[int]:
    """Powers of two below the number of slots, and that number: padding at most doubles a small batch."""
    return [*(2**power for power in range(num_slots.bit_length()) if 2**power < num_slots), num_slots]


class SlotEnds:
    """For each slot, where its valid tokens end, after every run and copy: idle rows write there."""

    def __init__(self, num_slots: int, slot_len: int) -> None:
        self._ends: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self._slot_len = slot_len

    def note_run(self, batch: Batch) -> None:
        """Trust the caller: a shorter length than before means that the row was truncated."""
        rows = slice(batch.first_slot, batch.first_slot + len(batch.past_len))
        self._ends[rows] = batch.past_len + batch.query_len

    def note_copy(self, target: int, num_tokens: int) -> None:
        self._ends[target] = num_tokens

    def padded(self, batch: Batch, num_rows: int) -> Batch | None:
        """A decode batch with idle rows added at its end; None if a slot there has no room for the token they write."""
        missing = num_rows - len(batch.past_len)
        ends = self._ends[batch.first_slot + len(batch.past_len) : batch.first_slot + num_rows]
        if missing and int(ends.max()) >= self._slot_len:
            return None
        return replace(
            batch,
            token_ids=np.concatenate([batch.token_ids, np.zeros((missing, 1), np.int64)]),
            past_len=np.concatenate([batch.past_len, ends]),
            query_len=np.concatenate([batch.query_len, np.zeros(missing, np.int32)]),
            logits_idx=np.concatenate([batch.logits_idx, np.zeros(num_rows - len(batch.logits_idx), np.int64)]),
        )


class DecodeGraphs:
    """The graphs that were recorded, by bucket. `make_context` gives a fresh context of the decode profile."""

    def __init__(self, cuda: Cuda, num_slots: int, make_context: Callable[[], ProfileContext]) -> None:
        self._cuda, self._make_context = cuda, make_context
        self.buckets = buckets_up_to(num_slots)
        self._contexts: dict[int, ProfileContext] = {}
        self._graphs: dict[int, CapturedGraph] = {}

    def bucket_of(self, num_rows: int) -> int:
        """The smallest that holds so many rows."""
        return next(bucket for bucket in self.buckets if bucket >= num_rows)

    def run(self, bucket: int, bind: Callable[[ProfileContext], None], then: Callable[[], None]) -> None:
        """Put a decode step on the stream: what `bind` sets up, then what `then` enqueues; recorded the second time.

        The first run of a bucket is not recorded: libraries initialize in it, and that cannot be captured.
        """
        if (graph := self._graphs.get(bucket)) is not None:
            graph.launch()
            return
        if is_first := bucket not in self._contexts:
            self._contexts[bucket] = self._make_context()
        context = self._contexts[bucket]
        bind(context)
        if is_first or not context.is_capturable:
            context.enqueue()
            then()
            return
        self._cuda.begin_capture()
        try:
            context.enqueue()
            then()
        finally:
            graph = self._cuda.end_capture()
        self._graphs[bucket] = graph
        log.info("recorded the decode step of %d rows", bucket)
        graph.launch()

    def free(self) -> None:
        """Give graphs, then contexts back. Idempotent."""
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._contexts.clear()
