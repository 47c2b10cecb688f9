"""The host as a device: what OrtSession needs of CUDA, done with plain memory, so that tests run it without a GPU."""

import ctypes
from typing import Any

from runtime.artifact.manifest import Artifact
from runtime.backends.cuda.cuda import PinnedMemory
from runtime.backends.ort.graph import CPU_PROVIDER, load_device_graph
from runtime.backends.ort.session import OrtSession


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


def on_host(artifact: Artifact, num_slots: int = 5) -> OrtSession:
    """The session of `--device cuda`, with ONNX Runtime's CPU provider."""
    graph = load_device_graph(artifact, CPU_PROVIDER)
    return OrtSession.on_device(graph, artifact, device="cpu", copier=HostCopier(), num_slots=num_slots, capacity=128)
