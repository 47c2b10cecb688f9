"""Weights in narrow floats or small integers times a scale for each block, as float32.

fp8     F8_E4M3 or F8_E5M2                       scale for a matrix, each row, or each block of rows and columns
e2m1    two to a byte, the first in the low half  scale for each block of a row
"""

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from runtime.errors import InvalidCheckpoint

FP8 = ("F8_E4M3", "F8_E5M2")

_SCALE_TYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "U8")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def read_scales(plain: SafetensorsCheckpoint, name: str) -> NDArray[np.float32]:
    """Scales as float32; U8 and F8_E8M0 are powers of two, 2^(byte - 127)."""
    stored = plain.load_stored(name, *_SCALE_TYPES)
    if stored.dtype == np.uint8:
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
    return stored.astype(np.float32)


def read_scalar(plain: SafetensorsCheckpoint, name: str) -> float:
    """The only number of a tensor. InvalidCheckpoint if it has several, or is not finite."""
    values = plain.load_stored(name, *_SCALE_TYPES).astype(np.float32).reshape(-1)
    if values.size != 1 or not np.isfinite(values).all():
        raise InvalidCheckpoint(f"{name} must be one finite number; it has the shape {list(plain.tensors[name].shape)}")
    return float(values[0])


def unpack_e2m1(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 `[N, K/2]` to float32 `[N, K]`."""
    return _E2M1[np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)]


def times_scales(
    weight: NDArray[np.float32], scales: NDArray[np.float32], name: str, *, block: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Multiply float32 `[N, K]` in place.

    scales: one number, `[N]`, `[N, G]` with G equal groups of each row, or `[ceil(N/rows), ceil(K/columns)]` for blocks
    block: rows and columns of a block, if scales are of blocks
    InvalidCheckpoint, naming the layer, for another shape.
    """
    n, k = weight.shape
    if scales.size == 1:
        weight *= scales.reshape(())
        return weight
    if scales.ndim == 1 and block is None:
        scales = scales[:, None]
    fits = scales.ndim == 2
    if fits and block is not None:
        rows, columns = block
        fits = scales.shape == (-(-n // rows), -(-k // columns))
    elif fits:
        fits = scales.shape[0] == n and scales.shape[1] > 0 and k % scales.shape[1] == 0
        rows, columns = 1, k // max(1, scales.shape[1])
    if not fits:
        of = "" if block is None else f" in blocks of {list(block)}"
        raise InvalidCheckpoint(f"{name}: scales {list(scales.shape)} do not fit a weight {[n, k]}{of}")
    for start in range(0, len(scales), 1):
        some = slice(start * rows, (start + 1) * rows)
        weight[some] *= np.repeat(scales[start], columns)[:k]
    return weight
