"""The Session on ONNX Runtime's CPU provider: one loaded graph, the KV pool in place, IO bindings kept.

Knows the tensor names of export/graph/decoder.py's graph through the manifest, and nothing of requests or text.
"""

import os
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact
from runtime.errors import InvalidArtifact, InvalidSetting
from runtime.machine.cpu_features import int8_options
from runtime.machine.kv_pages import lazy_zeros
from runtime.session.host_rows import HostRows
from runtime.session.ort_inputs import ort_inputs
from runtime.session.session import Batch, KvRows, SessionInfo
from runtime.session.trt_inputs import trt_inputs

# A binding holds two OrtValues a layer (about 0.4 ms to make for 30 layers). Decode needs one a batch size,
# prefill one a slot; the rest are rare shapes.
_MAX_BINDINGS = 256


WHOLE_ROWS = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Environment variable that ONNX Runtime reads when it makes attention kernels, its only switch for this: with more
threads than rows times heads its tiled kernel shares one row's cache out among threads, so that sums are added in
another order alone than in a batch (1e-5 of a logit); and it rounds a row's single token otherwise beside longer rows.
The other kernel does neither; one token in 32 rows took 0.7 to 0.9 of the time, a chunk of 128 the same, for up to
1,000 tokens. Its scores take rows * heads * chunk * capacity floats."""


class OrtSession:
    """Implements `runtime.session.session.Session`. Make it with `OrtSession.open`."""

    def __init__(
        self,
        session: Any,
        artifact: Artifact,
        *,
        num_slots: int,
        capacity: int,
        dialect: str = "ort",
        is_run_exact: bool = False,
    ) -> None:
        from onnxruntime import OrtValue

        dims, kv = artifact.manifest.dims, artifact.manifest.kv_of(dialect)
        self._inputs = partial(ort_inputs, doubles_singles=is_run_exact) if dialect == "ort" else trt_inputs
        self._session = session
        self._value = OrtValue.ortvalue_from_numpy
        # One more, where a single token's double may lie behind a slot that is full.
        shape = (num_slots, dims.num_kv_heads, capacity + is_run_exact, dims.head_dim)
        self._names: list[tuple[str, str]] = []
        self._pool: list[NDArray[Any]] = []
        for layer in range(dims.num_layers):
            for part in "kv":
                names = (
                    kv.past_name.format(layer=layer, kv=part),
                    kv.present_name.format(layer=layer, kv=part),
                )
                self._names.append(names)
                self._pool.append(lazy_zeros(shape, kv.dtype))
        self._bindings: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._logits = np.empty((num_slots, dims.vocab_size), np.float32)
        per_token = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * np.dtype(kv.dtype).itemsize
        self._info = SessionInfo(
            device="cpu",
            num_slots=num_slots,
            capacity=capacity,
            vocab_size=dims.vocab_size,
            is_ragged=True,
            kv_bytes_per_token=per_token,
            is_cut_exact=kv.dtype != "int8",
        )

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        *,
        num_slots: int,
        capacity: int,
        threads: int | None = None,
        saves_memory: bool = False,
        is_run_exact: bool = False,
        dialect: str = "ort",
    ) -> "OrtSession":
        """Load the graph; InvalidArtifact if ONNX Runtime refuses it.

        threads: None is one a physical core
        saves_memory: keep half-precision weights as they are, and widen them for this CPU at every run instead of
            once at load; slower, and half the memory
        is_run_exact: a token gets the same logits, bit for bit, in a run by itself as in one with others of its row, so
            that speculation is lossless; a decode step takes 5 to 8 % longer after 200 tokens, 8 to 25 % after 900 (30
            layers of 9 heads, 1 to 8 rows, AVX2). Not for an int8 cache: its fast kernel is the one for single tokens
        dialect: another than `ort` runs too, though slowly: to check what TensorRT will compile
        """
        import onnxruntime

        if not 1 <= capacity <= artifact.manifest.dims.max_len:
            raise InvalidSetting(
                f"a slot of {capacity:,} tokens does not fit: {artifact.path} was exported for 1 to "
                f"{artifact.manifest.dims.max_len:,} (export it again with a larger --max-len)"
            )
        options = _session_options(dialect, threads=threads, saves_memory=saves_memory)
        if is_run_exact or (threads or os.cpu_count() or 1) > artifact.manifest.dims.num_heads:
            os.environ[WHOLE_ROWS] = "1"
        try:
            session = onnxruntime.InferenceSession(
                str(artifact.model_file(dialect)),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if saves_memory else None,
            )
        except Exception as error:  # the library's exceptions share no base but Exception
            first_line = str(error).partition("\n")[0]
            raise InvalidArtifact(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {artifact.path}: {first_line}"
            ) from error
        finally:
            os.environ.pop(WHOLE_ROWS, None)
        return cls(
            session, artifact, num_slots=num_slots, capacity=capacity, dialect=dialect, is_run_exact=is_run_exact
        )

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch; logits float32 `[R, vocab_size]`, overwritten by the next call."""
        num_rows, chunk = batch.token_ids.shape
        self._check(batch, num_rows, chunk)
        num_logits = len(batch.logits_idx)
        if num_logits > len(self._logits):
            self._logits = np.empty((num_logits, self._info.vocab_size), np.float32)
        logits = self._logits[:num_logits]
        binding = self._binding(num_rows, batch.first_slot)
        for name, array in self._inputs(batch).items():
            binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_output("logits", self._value(logits))
        self._session.run_with_iobinding(binding)
        return logits

    def _check(self, batch: Batch, num_rows: int, chunk: int) -> None:
        # An empty batch would crash the process inside the kernel, so these are ours to catch.
        assert num_rows >= 1 and chunk >= 1 and len(batch.logits_idx) >= 1, "an empty batch"
        assert 0 <= batch.first_slot <= self._info.num_slots - num_rows, "slots outside the pool"
        assert int(batch.past_len.max()) + chunk <= self._info.capacity, "a row longer than its slot"

    def _binding(self, num_rows: int, first_slot: int) -> Any:
        """The IO binding whose cache tensors are these slots' memory; made once a (rows, first slot)."""
        key = (num_rows, first_slot)
        binding = self._bindings.get(key)
        if binding is not None:
            self._bindings.move_to_end(key)
            return binding
        binding = self._session.io_binding()
        for (past, present), pool in zip(self._names, self._pool, strict=True):
            value = self._value(pool[first_slot : first_slot + num_rows])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self._bindings[key] = binding
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of every layer's K and V."""
        for pool in self._pool:
            pool[target, :, :num_tokens] = pool[source, :, :num_tokens]

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """Copy those positions of every layer's K and V."""
        return HostRows([pool[slot, :, start:stop].copy() for pool in self._pool])

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        """Copy them back, to another place perhaps."""
        assert isinstance(rows, HostRows), "rows of another session"
        for pool, array in zip(self._pool, rows.arrays, strict=True):
            pool[slot, :, start : start + array.shape[1]] = array

    def close(self) -> None:
        """Drop the bindings, the cache and the model."""
        self._bindings.clear()
        self._pool.clear()
        self._session = None


def _session_options(dialect: str, *, threads: int | None, saves_memory: bool) -> Any:
    """ONNX Runtime's SessionOptions for this processor; the arguments are those of `OrtSession.open`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    for name, value in int8_options().items():
        options.add_session_config_entry(name, value)
    if saves_memory:
        # Level "all" widens half-precision weights while loading, and so does constant folding. Widened one at a
        # time, just before its use, each is freed after it, where the default order widens all of them first.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if dialect != "ort":
        # As written, without int8 kernels and fusions: it is TensorRT that will choose those.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options
