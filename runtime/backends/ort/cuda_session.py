"""The Session on ONNX Runtime with the KV pool in a device's memory: CUDA's, through onnxruntime-gpu.

onnxruntime-gpu 1.31 has no `query_seqlens` input of GroupQueryAttention: the graph is loaded without it, and the
session says that it is not ragged, so that the scheduler decodes full rows and prefills one prompt at a time. All but
the provider is the same on the CPU, where the tests run it.
"""

import ctypes
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact
from runtime.backends.cuda.cuda import PinnedMemory
from runtime.backends.cuda.rows import RowCopier, RowStage
from runtime.backends.ort.drop_inputs import without_inputs
from runtime.errors import DeviceUnavailable, InvalidArtifact
from runtime.machine.cpu_features import int8_options
from runtime.machine.sizes import item_bytes
from runtime.session.host_rows import HostRows
from runtime.session.ort_inputs import ort_inputs
from runtime.session.session import Batch, KvRows, SessionInfo

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_MAX_BINDINGS = 256
_NUM_ATTENTION_INPUTS = 9
"""query, key, value, past key, past value, lengths, capacity, cos, sin; what follows is left out in older releases."""


class DeviceCopier(RowCopier, Protocol):
    """Copies on the device, and between it and the host; `runtime.backends.cuda.cuda.Cuda` is one."""

    def copy_rows(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None: ...
    def close(self) -> None: ...


class HostCopier:
    """A DeviceCopier where the device is the host."""

    def __init__(self) -> None:
        self._buffers: dict[int, Any] = {}

    def allocate_pinned(self, num_bytes: int, what: str) -> PinnedMemory:
        """Plain memory."""
        buffer = (ctypes.c_uint8 * num_bytes)()
        self._buffers[ctypes.addressof(buffer)] = buffer
        return PinnedMemory(self, ctypes.addressof(buffer), num_bytes)

    def free_pinned(self, address: int) -> None:
        """Give it back."""
        del self._buffers[address]

    def copy_rows(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None:
        for row in range(num_rows):
            ctypes.memmove(target + row * pitch, source + row * pitch, width)

    def copy_rows_out(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None:
        for row in range(num_rows):
            ctypes.memmove(target + row * width, source + row * pitch, width)

    def copy_rows_in(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None:
        for row in range(num_rows):
            ctypes.memmove(target + row * pitch, source + row * width, width)

    def synchronize(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class OrtDeviceSession:
    """Implements `runtime.session.session.Session`, on a graph from `load_graph`. Closes the copier with itself."""

    def __init__(
        self, session: Any, artifact: Artifact, device: str, copier: DeviceCopier, *, num_slots: int, capacity: int
    ) -> None:
        from onnxruntime import OrtValue

        dims, kv = artifact.manifest.dims, artifact.manifest.kv
        self._session, self._device, self._copier = session, device, copier
        self._value = OrtValue.ortvalue_from_numpy
        self._dtype = np.dtype(kv.dtype)
        self._tail = (dims.num_kv_heads, capacity, dims.head_dim)
        self._slot_bytes = int(np.prod(self._tail)) * item_bytes(kv.dtype)
        row_bytes = dims.head_dim * item_bytes(kv.dtype)
        self._stage = RowStage(copier, kv_heads=dims.num_kv_heads, head_bytes=capacity * row_bytes, row_bytes=row_bytes)
        zeros = np.zeros((num_slots, *self._tail), self._dtype)
        self._names = [
            (kv.past_name.format(layer=layer, kv=part), kv.present_name.format(layer=layer, kv=part))
            for layer in range(dims.num_layers)
            for part in "kv"
        ]
        # Each value is its own copy of the zeros on a device. On the host it would be the array itself.
        self._pool = [self._value(zeros.copy() if device == "cpu" else zeros, device, 0) for _ in self._names]
        self._bindings: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._info = SessionInfo(
            device=f"{device} with ONNX Runtime",
            num_slots=num_slots,
            capacity=capacity,
            vocab_size=dims.vocab_size,
            is_ragged=False,
            is_cut_exact=False,
            kv_bytes_per_token=artifact.kv_bytes_per_token,
        )

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch; logits float32 `[R, vocab_size]`."""
        num_rows, chunk = batch.token_ids.shape
        assert num_rows >= 1 and chunk >= 1 and len(batch.logits_idx) >= 1, "an empty batch"
        assert chunk == 1 or num_rows == 1, "a ragged batch for a session that is not ragged"
        assert (batch.query_len == chunk).all(), "an idle row: its last token would be overwritten"
        assert 0 <= batch.first_slot <= self._info.num_slots - num_rows, "slots outside the pool"
        assert int(batch.past_len.max()) + chunk <= self._info.capacity, "a row longer than its slot"
        logits = np.empty((len(batch.logits_idx), self._info.vocab_size), np.float32)
        binding = self._binding(num_rows, batch.first_slot)
        for name, array in ort_inputs(batch).items():
            binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_output("logits", self._value(logits))
        self._session.run_with_iobinding(binding)
        return logits

    def _binding(self, num_rows: int, first_slot: int) -> Any:
        """The IO binding whose cache tensors are these slots' memory; made once a (rows, first slot)."""
        key = (num_rows, first_slot)
        if (binding := self._bindings.get(key)) is not None:
            self._bindings.move_to_end(key)
            return binding
        binding = self._session.io_binding()
        shape = [num_rows, *self._tail]
        for (past, present), value in zip(self._names, self._pool, strict=True):
            address = value.data_ptr() + first_slot * self._slot_bytes
            binding.bind_input(past, self._device, 0, self._dtype.type, shape, address)
            binding.bind_output(present, self._device, 0, self._dtype.type, shape, address)
        self._bindings[key] = binding
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of every layer's K and V."""
        kv_heads, capacity, head_dim = self._tail
        row_bytes = head_dim * self._dtype.itemsize
        for value in self._pool:
            base = value.data_ptr()
            self._copier.copy_rows(
                base + target * self._slot_bytes,
                base + source * self._slot_bytes,
                pitch=capacity * row_bytes,
                width=num_tokens * row_bytes,
                num_rows=kv_heads,
            )
        self._copier.synchronize()  # ONNX Runtime runs on a stream of its own

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """Copy those positions of every layer's K and V to the host."""
        return self._stage.read(self._slot_addresses(slot), start, stop)

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        """Copy them to the device, to another place perhaps."""
        assert isinstance(rows, HostRows), "rows of another session"
        self._stage.write(self._slot_addresses(slot), start, rows)

    def _slot_addresses(self, slot: int) -> list[int]:
        return [value.data_ptr() + slot * self._slot_bytes for value in self._pool]

    def close(self) -> None:
        """Drop the bindings, the cache and the model. Idempotent."""
        self._stage.free()
        self._bindings.clear()
        self._pool.clear()
        self._session = None
        self._copier.close()


def load_graph(artifact: Artifact, device: str) -> Any:
    """An InferenceSession of the `ort` graph without its last input, on one provider.

    DeviceUnavailable if this ONNX Runtime lacks the provider or it does not start, InvalidArtifact if the graph is
    refused, or would run on the CPU after all.
    """
    import onnxruntime

    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            f"onnxruntime {onnxruntime.__version__} has no {provider}: install onnxruntime-gpu instead of onnxruntime; "
            "`headrace doctor` says how"
        )
    dtype = artifact.manifest.kv.dtype
    if device == "cuda" and dtype not in ("float16", "bfloat16"):
        raise InvalidArtifact(
            f"{artifact.path} computes in {dtype}: ONNX Runtime's attention on CUDA takes half precision alone; "
            "export it with --precision fp16"
        )
    file: Path = artifact.model_file("ort")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in int8_options().items():  # of what the provider leaves to the CPU
        options.add_session_config_entry(name, value)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact.path))
    try:
        model = without_inputs(file.read_bytes(), "GroupQueryAttention", _NUM_ATTENTION_INPUTS)
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # the library's exceptions share no base but Exception
        first_line = str(error).partition("\n")[0]
        raise InvalidArtifact(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {artifact.path} on {device}: {first_line}"
        ) from error
    if provider not in session.get_providers():
        raise DeviceUnavailable(f"ONNX Runtime's {provider} does not start here; `headrace doctor` says what it wants")
    return session
