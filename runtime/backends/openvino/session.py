"""The Session on OpenVINO's CPU kernels: tokens packed without padding, the KV slots as runs of cache blocks.

Slot s is the blocks s * n .. (s + 1) * n of every cache tensor `[slots * n, kv_heads, 32, head_dim]`, where
PagedAttention writes. Any batch of rows is one run, ragged or not.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact, ModelDims
from runtime.backends.openvino.graph import BLOCK, POSITIONS, GraphReader, cache_shape, num_blocks
from runtime.errors import DeviceUnavailable, InvalidSetting
from runtime.machine.cpu_limits import is_limited, model_threads
from runtime.machine.kv_pages import PAGE_BYTES, LazyArrays, PageLayout
from runtime.session.feeds import packed_inputs
from runtime.session.host_rows import HostRows
from runtime.session.session import Batch, KvRows, SessionInfo


def load_library() -> Any:
    """The openvino module. DeviceUnavailable, with the extra to install, if there is none."""
    try:
        import openvino
    except ImportError as error:
        first_line = str(error).partition("\n")[0]
        raise DeviceUnavailable(
            f"OpenVINO cannot be imported ({first_line}): pip install 'headrace[openvino]'"
        ) from error
    return openvino


class OpenVinoSession:
    """Implements `runtime.session.session.Session`. Make it with `OpenVinoSession.open`."""

    def __init__(self, library: Any, reader: GraphReader, model: Any, info: SessionInfo, artifact: Artifact) -> None:
        dims = artifact.manifest.dims
        self._library, self._reader, self._info = library, reader, info
        self._blocks = num_blocks(info.capacity)
        self._request: Any = model.create_infer_request()
        shape = cache_shape(dims, info.num_slots, info.capacity)
        all_names = artifact.manifest.kv.cache_names(dims.kv_layers)
        self._memory = LazyArrays(len(all_names), (info.num_slots, self._blocks, *shape[1:]), np.float32)
        self._pool = self._memory.arrays
        for names, array in zip(all_names, self._pool, strict=True):
            self._request.set_tensor(names.past, library.Tensor(array.reshape(shape), shared_memory=True))

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        *,
        num_slots: int,
        capacity: int,
        kv_budget: int | None = None,
        threads: int | None = None,
    ) -> "OpenVinoSession":
        """Load the `ort` graph. InvalidArtifact if OpenVINO cannot read it, DeviceUnavailable if it is not there.

        kv_budget: bytes that all slots together may commit; None: all may be full
        threads: None is one a physical core, or as many as this process may use
        """
        dims = artifact.manifest.dims
        if not 1 <= capacity <= dims.max_len:
            raise InvalidSetting(
                f"a slot of {capacity:,} tokens does not fit: {artifact.path} was exported for 1 to "
                f"{dims.max_len:,} (export it again with a larger --max-len)"
            )
        library = load_library()
        reader = GraphReader(library, artifact)
        # In float32 like ONNX Runtime: by default OpenVINO would take half precision where the processor has it.
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if threads is None and is_limited():
            threads = model_threads()
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        model = library.Core().compile_model(reader.read(), "CPU", options)
        info = SessionInfo(
            device=f"openvino {library.__version__.partition('-')[0]}",
            num_slots=num_slots,
            capacity=capacity,
            vocab_size=dims.vocab_size,
            is_ragged=True,
            kv_bytes_per_token=dims.kv_bytes_per_token("float32"),
            is_cut_exact=False,  # its kernels for one token and for several round differently
            kv_layout=_layout(dims),
            kv_budget=kv_budget,
            threads=threads or model_threads(),
        )
        return cls(library, reader, model, info, artifact)

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch; logits float32 `[R, vocab_size]`, overwritten by the next call."""
        num_rows, chunk = batch.token_ids.shape
        assert num_rows >= 1 and chunk >= 1 and len(batch.logits_idx) >= 1, "an empty batch"
        assert 0 <= batch.first_slot <= self._info.num_slots - num_rows, "slots outside the pool"
        assert int(batch.past_len.max()) + chunk <= self._info.capacity, "a row longer than its slot"
        for name, array in self._inputs(batch).items():
            self._request.set_tensor(name, self._library.Tensor(array))
        self._request.infer()
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data
        return logits

    def _inputs(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """The model's inputs but the caches; idle rows are left out."""
        packed = packed_inputs(batch)
        live = np.flatnonzero(batch.query_len)
        past, new = batch.past_len[live], batch.query_len[live]
        counts = -(-(past + new) // BLOCK)
        first_block = (batch.first_slot + live) * self._blocks
        rows, steps = packed["place_idx"][:, 0], packed["place_idx"][:, 1]
        return {
            "input_ids": packed["input_ids"],
            "logits_idx": packed["logits_idx"],
            POSITIONS: batch.past_len[rows] + steps,
            "past_lens": past,
            "subsequence_begins": _begins(new),
            "block_indices": np.concatenate(
                [
                    np.arange(first, first + count, dtype=np.int32)
                    for first, count in zip(first_block, counts, strict=True)
                ]
            ),
            "block_indices_begins": _begins(counts),
            "max_context_len": np.array((past + new).max(), np.int32),
        }

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the blocks of the first `num_tokens` positions of every layer's K and V."""
        count = num_blocks(num_tokens)
        for pool in self._pool:
            pool[target, :count] = pool[source, :count]

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """Copy those positions of every layer's K and V."""
        first, last = start // BLOCK, num_blocks(stop)
        kept = slice(start - first * BLOCK, stop - first * BLOCK)
        return HostRows([_joined(pool[slot, first:last])[:, kept].copy() for pool in self._pool])

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        """Copy them back, to the same place or another."""
        assert isinstance(rows, HostRows), "rows of another session"
        stop = start + rows.arrays[0].shape[1]
        for block in range(start // BLOCK, num_blocks(stop)):
            low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
            inside = slice(low - block * BLOCK, high - block * BLOCK)
            for pool, array in zip(self._pool, rows.arrays, strict=True):
                pool[slot, block, :, inside] = array[:, low - start : high - start]

    def drop_slot(self, slot: int) -> None:
        """Give the pages of a slot's blocks back to the system."""
        self._memory.drop_slot(slot)

    def close(self) -> None:
        """Drop the model and the cache. Idempotent."""
        self._request = None
        self._memory.free()


def _layout(dims: ModelDims) -> PageLayout:
    """Tokens fill the part of one head in a block, then that of the next block. If such a part does not fill whole
    pages, whole blocks count."""
    token_bytes, num_tensors = dims.head_dim * np.dtype(np.float32).itemsize, 2 * len(dims.kv_layers)
    if BLOCK * token_bytes % PAGE_BYTES == 0:
        return PageLayout(token_bytes, num_tensors * dims.num_kv_heads)
    token_bytes *= dims.num_kv_heads
    return PageLayout(token_bytes, num_tensors, page_bytes=BLOCK * token_bytes)


def _begins(counts: NDArray[Any]) -> NDArray[np.int32]:
    """Where each part begins among all, and their end: int32 `[n + 1]`."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _joined(blocks: NDArray[Any]) -> NDArray[Any]:
    """`[blocks, kv_heads, 32, head_dim]` as `[kv_heads, positions, head_dim]`."""
    count, heads, size, dim = blocks.shape
    return blocks.transpose(1, 0, 2, 3).reshape(heads, count * size, dim)
