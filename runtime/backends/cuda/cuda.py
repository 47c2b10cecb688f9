"""The part of CUDA that a session needs: device and pinned memory, one stream, captured graphs; every call checked.

`cuda.bindings.runtime` is handed in, so that tests can hand in a double (tests/support/simulated/cuda.py), and a test
compares the two, name by name. Nothing here knows about models.
"""

import ctypes
import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DeviceFailed, DeviceOutOfMemory, DeviceUnavailable
from runtime.machine.sizes import format_bytes

ALIGNMENT = 256
"""Of every address given to TensorRT; cudaMalloc's own alignment."""


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def open_cuda() -> "Cuda":
    """CUDA through cuda-python, on the first visible device. DeviceUnavailable says what is missing."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise DeviceUnavailable(f"cuda-python cannot be imported ({error}); pip install cuda-python") from error
    return Cuda(runtime)


class Cuda:
    """One device and one stream on it. DeviceUnavailable if the driver has none.

    Everything is put on the stream in order; the host may read what was copied to it after `synchronize`, and must not
    change what is being copied from it before.
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        error, count = api.cudaGetDeviceCount()
        if error != api.cudaError_t.cudaSuccess or not count:
            raise DeviceUnavailable(f"CUDA finds no device ({self._name(error)}): `headrace doctor` says more")
        (error, stream) = api.cudaStreamCreateWithFlags(api.cudaStreamNonBlocking)
        self._check(error, "creating a stream")
        self._stream: Any = stream

    @property
    def stream_handle(self) -> int:
        """The stream's address, as TensorRT takes it."""
        return int(self._stream)

    def capability(self) -> str:
        """Compute capability of the device, like sm86."""
        major, minor = (
            self._attribute(self._api.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor),
            self._attribute(self._api.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor),
        )
        return f"sm{major}{minor}"

    def device_name(self) -> str:
        """What the maker calls the device."""
        error, properties = self._api.cudaGetDeviceProperties(0)
        self._check(error, "reading the device's properties")
        name: bytes = properties.name
        return name.decode().rstrip("\0")

    def free_memory(self) -> int:
        """Bytes that can still be allocated on the device."""
        error, free, _ = self._api.cudaMemGetInfo()
        self._check(error, "reading the free memory")
        return int(free)

    def allocate(self, num_bytes: int, what: str) -> "DeviceMemory":
        """Device memory, its content undefined. DeviceOutOfMemory with both sizes."""
        error, address = self._api.cudaMalloc(num_bytes)
        self._check_memory(error, num_bytes, what)
        return DeviceMemory(self, int(address), num_bytes)

    def allocate_pinned(self, num_bytes: int, what: str) -> "PinnedMemory":
        """Host memory that the device can copy from and to while the host goes on."""
        error, address = self._api.cudaMallocHost(num_bytes)
        self._check_memory(error, num_bytes, what)
        return PinnedMemory(self, int(address), num_bytes)

    def copy_in(self, target: int, source: int, num_bytes: int) -> None:
        """Copy pinned host memory to the device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        (error,) = self._api.cudaMemcpyAsync(target, source, num_bytes, kind, self._stream)
        self._check(error, "copying to the device")

    def copy_out(self, target: int, source: int, num_bytes: int) -> None:
        """Copy from the device to pinned host memory; it is there after `synchronize`."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        (error,) = self._api.cudaMemcpyAsync(target, source, num_bytes, kind, self._stream)
        self._check(error, "copying from the device")

    def copy_within(self, target: int, source: int, num_bytes: int) -> None:
        """Copy on the device; the two ranges must not overlap."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (error,) = self._api.cudaMemcpyAsync(target, source, num_bytes, kind, self._stream)
        self._check(error, "copying on the device")

    def copy_rows(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None:
        """Copy the first `width` bytes of each of `num_rows` rows that lie `pitch` bytes apart, on the device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (error,) = self._api.cudaMemcpy2DAsync(target, pitch, source, pitch, width, num_rows, kind, self._stream)
        self._check(error, "copying on the device")

    def copy_rows_out(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None:
        """Copy rows that lie `pitch` bytes apart on the device into pinned host memory, without gaps."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        (error,) = self._api.cudaMemcpy2DAsync(target, width, source, pitch, width, num_rows, kind, self._stream)
        self._check(error, "copying from the device")

    def copy_rows_in(self, target: int, source: int, *, pitch: int, width: int, num_rows: int) -> None:
        """Copy rows that lie without gaps in pinned host memory to places `pitch` bytes apart."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        (error,) = self._api.cudaMemcpy2DAsync(target, pitch, source, width, width, num_rows, kind, self._stream)
        self._check(error, "copying to the device")

    def clear(self, address: int, num_bytes: int) -> None:
        """Set device memory to zero."""
        (error,) = self._api.cudaMemsetAsync(address, 0, num_bytes, self._stream)
        self._check(error, "clearing device memory")

    def synchronize(self) -> None:
        """Wait until everything put on the stream is done. DeviceFailed if any of it failed."""
        (error,) = self._api.cudaStreamSynchronize(self._stream)
        self._check(error, "running the model")

    def begin_capture(self) -> None:
        """Record what this thread puts on the stream from now on, instead of running it."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        (error,) = self._api.cudaStreamBeginCapture(self._stream, mode)
        self._check(error, "capturing a graph")

    def end_capture(self) -> "CapturedGraph":
        """What was recorded, ready to be launched."""
        error, graph = self._api.cudaStreamEndCapture(self._stream)
        self._check(error, "capturing a graph")
        error, executable = self._api.cudaGraphInstantiate(graph, 0)
        self._check(error, "instantiating a graph")
        (error,) = self._api.cudaGraphDestroy(graph)
        self._check(error, "releasing a graph")
        return CapturedGraph(self, executable)

    def launch(self, executable: Any) -> None:
        """Put a recorded graph on the stream."""
        (error,) = self._api.cudaGraphLaunch(executable, self._stream)
        self._check(error, "launching a graph")

    def free(self, address: int) -> None:
        """Give device memory back."""
        (error,) = self._api.cudaFree(address)
        self._check(error, "freeing device memory")

    def free_pinned(self, address: int) -> None:
        """Give pinned host memory back."""
        (error,) = self._api.cudaFreeHost(address)
        self._check(error, "freeing host memory")

    def free_graph(self, executable: Any) -> None:
        """Give a graph back."""
        (error,) = self._api.cudaGraphExecDestroy(executable)
        self._check(error, "releasing a graph")

    def close(self) -> None:
        """Destroy the stream. Idempotent."""
        if self._stream is not None:
            (error,) = self._api.cudaStreamDestroy(self._stream)
            self._stream = None
            self._check(error, "destroying a stream")

    def _attribute(self, attribute: Any) -> int:
        error, value = self._api.cudaDeviceGetAttribute(attribute, 0)
        self._check(error, "reading the device's properties")
        return int(value)

    def _check_memory(self, error: Any, num_bytes: int, what: str) -> None:
        if error == self._api.cudaError_t.cudaErrorMemoryAllocation:
            raise DeviceOutOfMemory(
                f"the device has no {format_bytes(num_bytes)} for {what}, {format_bytes(self.free_memory())} are free; "
                "lower --max-batch, --max-len or --kv-memory, or end other programs that use it"
            )
        self._check(error, f"allocating memory for {what}")

    def _check(self, error: Any, doing: str) -> None:
        if error == self._api.cudaError_t.cudaErrorMemoryAllocation:
            raise DeviceOutOfMemory(f"the device ran out of memory while {doing}; lower --max-batch or --kv-memory")
        if error != self._api.cudaError_t.cudaSuccess:
            raise DeviceFailed(f"CUDA failed while {doing}: {self._name(error)}")

    def _name(self, error: Any) -> str:
        _, name = self._api.cudaGetErrorName(error)
        return name.decode() if isinstance(name, bytes) else str(error)


class DeviceMemory:
    """A block of device memory; its address means nothing to the host."""

    def __init__(self, cuda: Cuda, address: int, num_bytes: int) -> None:
        self._cuda, self.address, self.num_bytes = cuda, address, num_bytes

    def free(self) -> None:
        """Give it back. Idempotent."""
        if self.address:
            self._cuda.free(self.address)
            self.address = 0


class PinnedOwner(Protocol):
    """Who takes pinned memory back."""

    def free_pinned(self, address: int) -> None: ...


class PinnedMemory:
    """A block of page-locked host memory."""

    def __init__(self, cuda: PinnedOwner, address: int, num_bytes: int) -> None:
        self._cuda, self.address, self.num_bytes = cuda, address, num_bytes

    def view(self, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """An array over a part of it; not to be used once it is freed."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        assert offset + num_bytes <= self.num_bytes, "a view beyond its memory"
        data = (ctypes.c_uint8 * num_bytes).from_address(self.address + offset)
        flat: NDArray[Any] = np.ctypeslib.as_array(data).view(dtype)
        return flat.reshape(shape)

    def free(self) -> None:
        """Give it back. Idempotent."""
        if self.address:
            self._cuda.free_pinned(self.address)
            self.address = 0


class CapturedGraph:
    """Work recorded once, put on the stream with one call."""

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self._executable = cuda, executable

    def launch(self) -> None:
        """Run it on the stream, in its turn."""
        self._cuda.launch(self._executable)

    def free(self) -> None:
        """Give it back. Idempotent."""
        if self._executable is not None:
            self._cuda.free_graph(self._executable)
            self._executable = None
