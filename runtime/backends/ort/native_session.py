"""The Session on the `native` graph: ONNX Runtime with the operators of runtime/native/.

Attention takes a slot for each row. So the whole KV pool is bound once, rows of any slots share a run, and idle rows
are not in it. A token's result depends on its row alone, to the bit: not on the batch, nor on where the row is cut.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact
from runtime.backends.ort.graph import cpu_threads, load_cpu_graph
from runtime.backends.ort.session import OrtSession, check_capacity, host_pool
from runtime.session.session import Batch, Session, SessionInfo


class NativeSession(OrtSession):
    """Make it with `NativeSession.open_native`."""

    @classmethod
    def open_native(
        cls,
        artifact: Artifact,
        *,
        num_slots: int,
        capacity: int,
        kv_budget: int | None = None,
        threads: int | None = None,
        saves_memory: bool = False,
    ) -> "NativeSession":
        """Load the graph. InvalidArtifact if it has none, DeviceUnavailable if the operators are not built.

        The arguments are those of `OrtSession.open`.
        """
        dims, kv = artifact.manifest.dims, artifact.manifest.kv_of("native")
        check_capacity(artifact, capacity)
        graph = load_cpu_graph(artifact, "native", threads=threads, saves_memory=saves_memory, keeps_rows_whole=False)
        pool, layout = host_pool(artifact.manifest, "native", num_slots=num_slots, capacity=capacity)
        info = SessionInfo(
            device="native",
            num_slots=num_slots,
            capacity=capacity,
            vocab_size=dims.vocab_size,
            is_ragged=True,
            is_cut_exact=True,
            is_sparse=True,
            is_run_exact=True,
            has_states=bool(artifact.manifest.states),
            kv_layout=layout,
            kv_budget=kv_budget,
            threads=cpu_threads(threads).likely,
            kv_bytes_per_token=dims.kv_bytes_per_token(kv.dtype),
            dialect="native",
        )
        return cls(graph, pool, slot_inputs, info)

    def _check(self, batch: Batch) -> None:
        num_rows, chunk = batch.token_ids.shape
        assert num_rows >= 1 and chunk >= 1 and len(batch.logits_idx) >= 1, "an empty batch"
        assert 0 <= batch.first_slot <= self._info.num_slots - num_rows, "slots outside the pool"
        assert int((batch.past_len + batch.query_len).max()) <= self._info.capacity, "a row longer than its slot"

    def _binding(self, num_rows: int, first_slot: int) -> Any:
        """The one binding, of the whole pool."""
        return super()._binding(self._info.num_slots, 0)


def slot_inputs(batch: Batch) -> Mapping[str, NDArray[Any]]:
    """Inputs of the `native` graph: running rows alone, packed, and the slot of each."""
    width = batch.token_ids.shape[1]
    rows = np.flatnonzero(batch.query_len)
    lens, past = batch.query_len[rows], batch.past_len[rows]
    first = np.zeros(len(batch.query_len), np.int64)  # where each row's tokens begin
    first[rows[1:]] = np.cumsum(lens[:-1])
    if width == 1:
        ids, positions = batch.token_ids[rows, 0], past.astype(np.int64)
    else:
        places = np.arange(int(lens.sum())) - np.repeat(first[rows], lens)
        ids, positions = batch.token_ids[np.repeat(rows, lens), places], np.repeat(past, lens) + places
    return {
        "input_ids": ids,
        "positions": positions,
        "slot": (batch.first_slot + rows).astype(np.int32),
        "past_len": past,
        "query_len": lens,
        "logits_idx": first[batch.logits_idx // width] + batch.logits_idx % width,
    }


def open_cpu_session(
    artifact: Artifact,
    dialect: str,
    *,
    num_slots: int,
    capacity: int,
    threads: int | None = None,
    saves_memory: bool = False,
) -> Session:
    """A session on one of the artifact's graphs, whichever it is, on the CPU."""
    if dialect == "native":
        return NativeSession.open_native(
            artifact, num_slots=num_slots, capacity=capacity, threads=threads, saves_memory=saves_memory
        )
    return OrtSession.open(
        artifact,
        num_slots=num_slots,
        capacity=capacity,
        threads=threads,
        saves_memory=saves_memory,
        dialect=dialect,
    )
