"""The Session on ONNX Runtime: one loaded graph, a KV pool that it writes in place, IO bindings that are kept.

Knows the tensor names of an artifact's graph through the manifest, and nothing of requests or text.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact, Manifest
from runtime.backends.ort.graph import cpu_threads, load_cpu_graph
from runtime.backends.ort.pools import DeviceCopier, DevicePool, HostPool, Pool, PoolShape
from runtime.errors import InvalidSetting
from runtime.machine.kv_pages import PageLayout, aligned_len, head_layout
from runtime.session.feeds import PackedInputs, padded_inputs
from runtime.session.host_rows import HostRows
from runtime.session.session import Batch, KvRows, SessionInfo

# A binding holds two OrtValues a layer (about 0.4 ms to make for 30 layers). Decode needs one a batch size,
# prefill one a slot; the rest are rare shapes.
_MAX_BINDINGS = 256

Inputs = Callable[[Batch], Mapping[str, NDArray[Any]]]


class OrtSession:
    """Implements `runtime.session.session.Session`. Make it with `OrtSession.open` or `OrtSession.on_device`.

    graph: an onnxruntime.InferenceSession; inputs: makes all its inputs but the caches; pool: owned, freed with this
    """

    def __init__(self, graph: Any, pool: Pool, inputs: Inputs, info: SessionInfo) -> None:
        from onnxruntime import OrtValue

        self._graph, self._pool, self._inputs, self._info = graph, pool, inputs, info
        self._value = OrtValue.ortvalue_from_numpy
        self._bindings: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._logits = np.empty((info.num_slots, info.vocab_size), np.float32)

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        *,
        num_slots: int,
        capacity: int,
        kv_budget: int | None = None,
        threads: int | None = None,
        saves_memory: bool = False,
        is_run_exact: bool = False,
        dialect: str = "ort",
    ) -> "OrtSession":
        """Load the graph on the CPU; InvalidArtifact if ONNX Runtime refuses it, DeviceUnavailable if it is not there.

        kv_budget: bytes that all slots together may commit; None: all may be full
        threads: None is one a physical core, or as many as this process may use
        saves_memory: keep half-precision weights as they are, and widen them for this CPU at every run instead of
            once at load; slower, and half the memory
        is_run_exact: a token gets the same logits, bit for bit, in a run by itself as in one with others of its row, so
            that speculation is lossless; a decode step takes 5 to 8 % longer after 200 tokens, 8 to 25 % after 900 (30
            layers of 9 heads, 1 to 8 rows, AVX2). Not for an int8 cache: its fast kernel is the one for single tokens
        dialect: another than `ort` runs too, though slowly: to check what TensorRT will compile
        """
        manifest = artifact.manifest
        dims, kv = manifest.dims, manifest.kv_of(dialect)
        check_capacity(artifact, capacity)
        keeps_rows_whole = is_run_exact or cpu_threads(threads).most > dims.num_heads
        graph = load_cpu_graph(
            artifact, dialect, threads=threads, saves_memory=saves_memory, keeps_rows_whole=keeps_rows_whole
        )
        # One position more, for the copy of a single token (`PackedInputs`), when the slot is full too.
        pool, layout = host_pool(manifest, dialect, num_slots=num_slots, capacity=capacity, num_spare=int(is_run_exact))
        assert not (is_run_exact and manifest.states), "a copy of a token would enter the states"
        inputs = PackedInputs(doubles_singles=is_run_exact) if dialect == "ort" else padded_inputs_of(manifest)
        info = SessionInfo(
            device="cpu",
            num_slots=num_slots,
            capacity=capacity,
            vocab_size=dims.vocab_size,
            is_ragged=True,
            kv_bytes_per_token=dims.kv_bytes_per_token(kv.dtype),
            is_cut_exact=kv.dtype != "int8",
            is_run_exact=is_run_exact,
            has_states=bool(manifest.states),
            kv_layout=layout,
            kv_budget=kv_budget,
            threads=cpu_threads(threads).likely,
        )
        return cls(graph, pool, inputs, info)

    @classmethod
    def on_device(
        cls, graph: Any, artifact: Artifact, *, device: str, copier: DeviceCopier, num_slots: int, capacity: int
    ) -> "OrtSession":
        """A session on a graph from `load_device_graph`, with the KV pool in the device's memory.

        Its attention has no length for each row, so the session is not ragged: the scheduler decodes full rows and
        prefills one prompt at a time.
        """
        dims, kv = artifact.manifest.dims, artifact.manifest.kv
        shape = PoolShape(num_slots, dims.num_kv_heads, capacity, dims.head_dim)
        info = SessionInfo(
            device=f"{device} with ONNX Runtime",
            num_slots=num_slots,
            capacity=capacity,
            vocab_size=dims.vocab_size,
            is_ragged=False,
            is_cut_exact=False,
            kv_bytes_per_token=artifact.kv_bytes_per_token(),
        )
        names = kv.cache_names(dims.kv_layers)
        return cls(graph, DevicePool(names, shape, kv.dtype, device=device, copier=copier), PackedInputs(), info)

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch; logits float32 `[R, vocab_size]`, overwritten by the next call."""
        num_rows, _ = batch.token_ids.shape
        self._check(batch)
        num_logits = len(batch.logits_idx)
        if num_logits > len(self._logits):
            self._logits = np.empty((num_logits, self._info.vocab_size), np.float32)
        logits = self._logits[:num_logits]
        binding = self._binding(num_rows, batch.first_slot)
        for name, array in self._inputs(batch).items():
            binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_output("logits", self._value(logits))
        self._graph.run_with_iobinding(binding)
        return logits

    def _check(self, batch: Batch) -> None:
        # An empty batch would crash the process inside the kernel, so these are ours to catch.
        num_rows, chunk = batch.token_ids.shape
        assert num_rows >= 1 and chunk >= 1 and len(batch.logits_idx) >= 1, "an empty batch"
        assert 0 <= batch.first_slot <= self._info.num_slots - num_rows, "slots outside the pool"
        assert int(batch.past_len.max()) + chunk <= self._info.capacity, "a row longer than its slot"
        if not self._info.is_ragged:
            assert chunk == 1 or num_rows == 1, "a ragged batch for a session that is not ragged"
            assert (batch.query_len == chunk).all(), "an idle row: its last token would be overwritten"

    def _binding(self, num_rows: int, first_slot: int) -> Any:
        """The IO binding whose cache tensors are these slots' memory; made once a (rows, first slot)."""
        key = (num_rows, first_slot)
        if (binding := self._bindings.get(key)) is not None:
            self._bindings.move_to_end(key)
            return binding
        binding = self._graph.io_binding()
        self._pool.bind(binding, first_slot, num_rows)
        self._bindings[key] = binding
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of every layer's K and V."""
        self._pool.copy_slot(source, target, num_tokens)

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """Copy those positions of every layer's K and V to the host."""
        return self._pool.read_slot(slot, start, stop)

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        """Copy them back, to the same place or another."""
        assert isinstance(rows, HostRows), "rows of another session"
        self._pool.write_slot(slot, start, rows)

    def read_states(self, slot: int) -> HostRows:
        """Copy a slot's states to the host. Only the pool in the host's memory has any."""
        assert isinstance(self._pool, HostPool)
        return self._pool.read_states(slot)

    def write_states(self, slot: int, states: KvRows) -> None:
        """Copy them back, to the same slot or another."""
        assert isinstance(self._pool, HostPool) and isinstance(states, HostRows), "states of another session"
        self._pool.write_states(slot, states)

    def drop_slot(self, slot: int) -> None:
        """Give a slot's pages back to the system."""
        self._pool.drop_slot(slot)

    def close(self) -> None:
        """Drop the bindings, the cache and the model. Idempotent."""
        self._bindings.clear()
        self._pool.free()
        self._graph = None


def padded_inputs_of(manifest: Manifest) -> Inputs:
    """What makes the inputs of a standard graph."""
    return partial(padded_inputs, has_states=bool(manifest.states))


def host_pool(
    manifest: Manifest, dialect: str, *, num_slots: int, capacity: int, num_spare: int = 0
) -> tuple[HostPool, PageLayout]:
    """The KV cache and the states in the host's memory, and how tokens fill its pages.

    num_spare: positions behind a slot's last
    """
    dims, kv = manifest.dims, manifest.kv_of(dialect)
    layout = head_layout(
        num_layers=len(dims.kv_layers), num_kv_heads=dims.num_kv_heads, head_dim=dims.head_dim, dtype=kv.dtype
    )._replace(num_spare=num_spare)
    slot_len = aligned_len(capacity + num_spare, layout.token_bytes)
    shape = PoolShape(num_slots, dims.num_kv_heads, slot_len, dims.head_dim)
    return HostPool(kv.cache_names(dims.kv_layers), shape, kv.dtype, manifest.states), layout


def check_capacity(artifact: Artifact, capacity: int) -> None:
    """InvalidSetting if the artifact's rotary tables do not cover a slot of so many tokens."""
    if not 1 <= capacity <= artifact.manifest.dims.max_len:
        raise InvalidSetting(
            f"a slot of {capacity:,} tokens does not fit: {artifact.path} was exported for 1 to "
            f"{artifact.manifest.dims.max_len:,} (export it again with a larger --max-len)"
        )
