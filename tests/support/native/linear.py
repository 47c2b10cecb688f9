"""Products of the native library through ctypes, and what they have to be."""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.storage.blocks import QuantizedRows, unpack
from tests.support.native.calls import address


class WeightShape(ctypes.Structure):
    """`WeightShape` of runtime/native/linear/linear.h."""

    _fields_ = (
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("has_zero_points", ctypes.c_int32),
        ("has_block_scales", ctypes.c_int32),
    )


@dataclass(frozen=True)
class PackedWeights:
    """Weights that the library has packed. scale: of the inputs; 0 to find one for each block."""

    library: ctypes.CDLL
    shape: WeightShape
    packed: NDArray[np.uint8]
    scale: float = 0

    def multiply(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """float32 `[rows, K]` -> `[rows, N]`."""
        y = np.full((len(x), self.shape.num_outputs), np.nan, np.float32)
        function = self.library.headrace_multiply
        function.argtypes = (
            *(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int,
        )  # fmt: skip
        function(ctypes.addressof(self.shape), address(self.packed), address(np.ascontiguousarray(x)), len(x),
                 self.scale, address(y), threads)  # fmt: skip
        return y


def pack_blocks(library: ctypes.CDLL, rows: QuantizedRows, num_inputs: int, *, bits: int) -> PackedWeights:
    """Blocks as MatMulNBits has them."""
    n, _, block_bytes = rows.values.shape
    has_zeros = rows.zero_points is not None
    shape = WeightShape(n, num_inputs, block_bytes * 8 // bits, bits, has_zeros, True)
    packed = _memory(library, shape)
    arrays = [ctypes.c_void_p(address(array)) for array in (rows.values, rows.scales, rows.zero_points, packed)]
    library.headrace_pack_blocks(ctypes.byref(shape), *arrays)
    return PackedWeights(library, shape, packed)


def pack_channels(
    library: ctypes.CDLL,
    values: NDArray[np.int8],
    scales: NDArray[np.float32],
    *,
    group: int = 0,
    scale: float = 0,
) -> PackedWeights:
    """int8 `[K, N]` with a scale for each column. group: inputs that share a scale; 0 for all."""
    k, n = values.shape
    shape = WeightShape(n, k, group or k, 8, False, False)
    packed = _memory(library, shape)
    arrays = [ctypes.c_void_p(address(array)) for array in (values, scales, packed)]
    library.headrace_pack_channels(ctypes.byref(shape), *arrays)
    return PackedWeights(library, shape, packed, scale)


def _memory(library: ctypes.CDLL, shape: WeightShape) -> NDArray[np.uint8]:
    library.headrace_packed_bytes.restype = ctypes.c_int64
    return np.empty(library.headrace_packed_bytes(ctypes.byref(shape)), np.uint8)


def quantized_inputs(x: NDArray[np.float32], block: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The integers `[rows, blocks, block]` and the scales `[rows, blocks]` that the kernels find, to the bit."""
    num_blocks = -(-x.shape[1] // block)
    padded = np.zeros((len(x), num_blocks * block), np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(len(x), num_blocks, block)
    most = np.abs(blocks).max(-1)
    inverse = np.where(most > 0, np.float32(127) / np.where(most > 0, most, np.float32(1)), np.float32(0))
    return np.rint(blocks * inverse[..., None]).astype(np.int64), most / np.float32(127)


def block_product(x: NDArray[np.float32], rows: QuantizedRows, *, bits: int) -> NDArray[np.float64]:
    """What the integers of inputs and weights give in float64."""
    n, num_blocks, block_bytes = rows.values.shape
    integers, scales = quantized_inputs(x, block_bytes * 8 // bits)
    weights = unpack(rows.values, bits).reshape(n, num_blocks, -1).astype(np.int64)
    zeros = 1 << (bits - 1) if rows.zero_points is None else unpack(rows.zero_points, bits)[:, :num_blocks, None]
    sums = np.einsum("mbk,nbk->mnb", integers, weights - np.asarray(zeros, np.int64))
    return np.asarray((sums * scales[:, None].astype(np.float64) * rows.scales).sum(-1))
