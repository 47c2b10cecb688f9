"""A strict double of `cuda.bindings.runtime`: the functions that `runtime/backends/cuda/cuda.py` calls, on host
buffers.

Work put on a stream runs when the stream is waited for, so that nothing works by luck of timing. Device addresses mean
nothing to the host. New device memory, and host memory that a copy is on its way to, hold 0xFF: NaN as a float, -1 as
an id. Every misuse raises MisuseError: memory that is freed or never was, a range that runs out of its block, host
memory changed while it is copied from or read too early, work on a stream that is being captured.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

POISON = 0xFF
DEVICE_BASE = 0x7F00_0000_0000
GAP = 1 << 16
"""Between two blocks, so that running out of one never ends in another."""


class MisuseError(AssertionError):
    """CUDA or TensorRT used in a way that real hardware punishes, or worse, does not."""


class CudaError(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


class MemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class DeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class StreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


@dataclass
class DeviceBlock:
    """Live device memory."""

    address: int
    data: NDArray[np.uint8]


@dataclass
class PinnedBlock:
    """Live pinned host memory, and the copies under way to or from it."""

    address: int
    buffer: Any
    data: NDArray[np.uint8]


@dataclass
class Work:
    """Something on a stream: `run` does it, `touches` are the blocks it uses."""

    run: Callable[[], None]
    touches: list[DeviceBlock | PinnedBlock]


@dataclass
class Stream:
    """Work in order; `captured` is a list while a graph is recorded."""

    handle: int
    pending: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None

    def __int__(self) -> int:
        return self.handle

    def put(self, work: Work) -> None:
        (self.pending if self.captured is None else self.captured).append(work)


@dataclass
class Graph:
    works: list[Work]
    is_destroyed: bool = False


class SimCuda:
    """Stands for the module `cuda.bindings.runtime`. `total_bytes` is the device's memory."""

    cudaError_t = CudaError
    cudaMemcpyKind = MemcpyKind
    cudaDeviceAttr = DeviceAttr
    cudaStreamCaptureMode = StreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, *, total_bytes: int = 1 << 30, num_devices: int = 1) -> None:
        self._total, self._num_devices = total_bytes, num_devices
        self._next_address, self._next_handle = DEVICE_BASE, 0x5000
        self._device: dict[int, DeviceBlock] = {}
        self._pinned: dict[int, PinnedBlock] = {}
        self._streams: dict[int, Stream] = {}
        self.graphs: list[Graph] = []
        self.copied_out: list[int] = []
        """Bytes of every copy to the host, in order."""
        self.num_launches = 0
        self.fail_at_synchronize = CudaError.cudaSuccess

    # What runtime/backends/cuda/cuda.py calls, with the real names and parameters.

    def cudaGetDeviceCount(self) -> tuple[CudaError, int | None]:
        return (CudaError.cudaSuccess, self._num_devices) if self._num_devices else (CudaError.cudaErrorNoDevice, None)

    def cudaGetErrorName(self, error: CudaError) -> tuple[CudaError, bytes]:
        return CudaError.cudaSuccess, error.name.encode()

    def cudaDeviceGetAttribute(self, attr: DeviceAttr, device: int) -> tuple[CudaError, int]:
        self._check_device(device)
        return CudaError.cudaSuccess, 8 if attr is DeviceAttr.cudaDevAttrComputeCapabilityMajor else 9

    def cudaGetDeviceProperties(self, device: int) -> tuple[CudaError, Any]:
        self._check_device(device)
        return CudaError.cudaSuccess, SimpleNamespace(name=b"Simulated GPU")

    def cudaMemGetInfo(self) -> tuple[CudaError, int, int]:
        return CudaError.cudaSuccess, self._total - self.used_bytes, self._total

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, Stream]:
        if flags != self.cudaStreamNonBlocking:
            raise MisuseError("a blocking stream waits for the default stream")
        self._next_handle += 16
        stream = self._streams[self._next_handle] = Stream(self._next_handle)
        return CudaError.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[CudaError]:
        if self.stream_of(int(stream)).pending:
            raise MisuseError("a stream destroyed with work on it")
        del self._streams[int(stream)]
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[CudaError]:
        real = self.stream_of(int(stream))
        if real.captured is not None:
            raise MisuseError("waiting for a stream that is being captured")
        works, real.pending = real.pending, []
        for work in works:
            work.run()
        return (self.fail_at_synchronize,)

    def cudaMalloc(self, size: int) -> tuple[CudaError, int | None]:
        self._check_not_capturing()
        if size <= 0:
            raise MisuseError(f"an allocation of {size} bytes")
        if self.used_bytes + size > self._total:
            return CudaError.cudaErrorMemoryAllocation, None
        address = self._next_address
        self._device[address] = DeviceBlock(address, np.full(size, POISON, np.uint8))
        self._next_address += -(-size // 256) * 256 + GAP
        return CudaError.cudaSuccess, address

    def cudaFree(self, devPtr: int) -> tuple[CudaError]:
        self._check_not_capturing()
        if devPtr not in self._device:
            raise MisuseError(f"{devPtr:#x} is not allocated, or was freed before")
        self._check_idle(self._device.pop(devPtr))
        return (CudaError.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[CudaError, int]:
        self._check_not_capturing()
        buffer = (ctypes.c_uint8 * size)()
        data = np.ctypeslib.as_array(buffer)
        data[:] = POISON
        address = ctypes.addressof(buffer)
        self._pinned[address] = PinnedBlock(address, buffer, data)
        return CudaError.cudaSuccess, address

    def cudaFreeHost(self, ptr: int) -> tuple[CudaError]:
        if ptr not in self._pinned:
            raise MisuseError(f"{ptr:#x} is not pinned host memory, or was freed before")
        self._check_idle(self._pinned.pop(ptr))
        return (CudaError.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: MemcpyKind, stream: Stream) -> tuple[CudaError]:
        real = self.stream_of(int(stream))
        if kind is MemcpyKind.cudaMemcpyDeviceToDevice:
            self._copy_within(real, dst, src, count)
        elif real.captured is not None:
            raise MisuseError("copies from or to the host are not simulated in a graph")
        elif kind is MemcpyKind.cudaMemcpyHostToDevice:
            self._copy_in(real, dst, src, count)
        else:
            self._copy_out(real, dst, src, count)
        return (CudaError.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: MemcpyKind, stream: Stream
    ) -> tuple[CudaError]:
        if width > min(dpitch, spitch):
            raise MisuseError(f"a copy of rows of {width} bytes, {dpitch} and {spitch} apart")
        for row in range(height):
            self.cudaMemcpyAsync(dst + row * dpitch, src + row * spitch, width, kind, stream)
        return (CudaError.cudaSuccess,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Stream) -> tuple[CudaError]:
        block = self.block_of(devPtr, count)

        def run() -> None:
            self.bytes_at(devPtr, count)[:] = value

        self.stream_of(int(stream)).put(Work(run, [block]))
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: StreamCaptureMode) -> tuple[CudaError]:
        real = self.stream_of(int(stream))
        if real.captured is not None:
            raise MisuseError("a capture inside a capture")
        real.captured = []
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[CudaError, Graph]:
        real = self.stream_of(int(stream))
        if real.captured is None:
            raise MisuseError("no capture to end")
        graph, real.captured = Graph(real.captured), None
        return CudaError.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[CudaError, Graph]:
        executable = Graph(list(graph.works))
        self.graphs.append(executable)
        return CudaError.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: Graph) -> tuple[CudaError]:
        graph.is_destroyed = True
        return (CudaError.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: Graph, stream: Stream) -> tuple[CudaError]:
        if graphExec.is_destroyed or graphExec not in self.graphs:
            raise MisuseError("a graph launched after it was destroyed")
        for work in graphExec.works:
            self.stream_of(int(stream)).put(work)
        self.num_launches += 1
        return (CudaError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: Graph) -> tuple[CudaError]:
        graphExec.is_destroyed = True
        self.graphs.remove(graphExec)
        return (CudaError.cudaSuccess,)

    # For the double of TensorRT, and for tests.

    @property
    def used_bytes(self) -> int:
        return sum(len(block.data) for block in self._device.values())

    def assert_all_freed(self) -> None:
        """Nothing is left allocated: call it when a session is closed."""
        assert not self._device and not self._pinned and not self._streams and not self.graphs

    def stream_of(self, handle: int) -> Stream:
        if handle not in self._streams:
            raise MisuseError(f"{handle:#x} is not a stream, or was destroyed")
        return self._streams[handle]

    def block_of(self, address: int, num_bytes: int) -> DeviceBlock:
        """The live block that holds the whole range."""
        for block in self._device.values():
            if block.address <= address < block.address + len(block.data):
                if address + num_bytes > block.address + len(block.data):
                    raise MisuseError(f"{num_bytes} bytes at {address:#x} run out of their block")
                return block
        raise MisuseError(f"{address:#x} is not device memory, or was freed")

    def bytes_at(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        """The bytes themselves; the block must be live now."""
        block = self.block_of(address, num_bytes)
        return block.data[address - block.address : address - block.address + num_bytes]

    def _copy_in(self, stream: Stream, dst: int, src: int, count: int) -> None:
        device, (host, view) = self.block_of(dst, count), self._host_range(src, count)
        before = view.tobytes()

        def run() -> None:
            if view.tobytes() != before:
                raise MisuseError("host memory was changed while it was copied to the device")
            self.bytes_at(dst, count)[:] = view

        stream.put(Work(run, [device, host]))

    def _copy_out(self, stream: Stream, dst: int, src: int, count: int) -> None:
        device, (host, view) = self.block_of(src, count), self._host_range(dst, count)
        view[:] = POISON
        self.copied_out.append(count)

        def run() -> None:
            if not (view == POISON).all():
                raise MisuseError("host memory was written to while it was copied from the device")
            view[:] = self.bytes_at(src, count)

        stream.put(Work(run, [device, host]))

    def _copy_within(self, stream: Stream, dst: int, src: int, count: int) -> None:
        if abs(dst - src) < count:
            raise MisuseError("a copy between ranges that overlap")
        blocks: list[DeviceBlock | PinnedBlock] = [self.block_of(dst, count), self.block_of(src, count)]

        def run() -> None:
            self.bytes_at(dst, count)[:] = self.bytes_at(src, count)

        stream.put(Work(run, blocks))

    def _host_range(self, address: int, num_bytes: int) -> tuple[PinnedBlock, NDArray[np.uint8]]:
        for block in self._pinned.values():
            start = address - block.address
            if 0 <= start < len(block.data):
                if start + num_bytes > len(block.data):
                    raise MisuseError(f"{num_bytes} bytes at {address:#x} run out of their pinned block")
                return block, block.data[start : start + num_bytes]
        raise MisuseError(f"{address:#x} is not pinned host memory: the copy would not be asynchronous")

    def _check_idle(self, block: DeviceBlock | PinnedBlock) -> None:
        for stream in self._streams.values():
            if any(any(each is block for each in work.touches) for work in stream.pending):
                raise MisuseError("memory freed while work on a stream uses it")

    def _check_not_capturing(self) -> None:
        if any(stream.captured is not None for stream in self._streams.values()):
            raise MisuseError("memory allocated or freed while a graph is captured")

    def _check_device(self, device: int) -> None:
        if device >= self._num_devices:
            raise MisuseError(f"device {device} of {self._num_devices}")
