"""Calls kernels of the native library through ctypes, without a session."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.native.library import VARIANTS, variant_of

NAMES = tuple(VARIANTS)


@contextmanager
def variant(library: ctypes.CDLL, name: str) -> Iterator[bool]:
    """Use one variant of the kernels meanwhile; False if this processor does not run it."""
    before = variant_of(library)
    try:
        yield bool(library.headrace_use_variant(name.encode()))
    finally:
        library.headrace_use_variant(before.encode())


def address(array: NDArray[Any] | None) -> int | None:
    """Of a contiguous array's memory, as a ctypes pointer field takes it."""
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


class AddNormJob(ctypes.Structure):
    """`AddNorm` of runtime/native/norm/norm.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "skip", "weight", "bias", "normed", "sum")),
        ("num_rows", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("epsilon", ctypes.c_float),
        ("is_layer_norm", ctypes.c_bool),
    )


class GateUpJob(ctypes.Structure):
    """`GateUp` of runtime/native/norm/norm.h."""

    _fields_ = (
        ("stacked", ctypes.c_void_p),
        ("gated", ctypes.c_void_p),
        ("num_rows", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("activation", ctypes.c_int),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
    )


def add_norm(
    library: ctypes.CDLL,
    x: NDArray[np.float32],
    skip: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    *,
    is_layer_norm: bool,
    threads: int = 1,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Norm of x + skip with epsilon 1e-5, and the sum."""
    normed, total = np.empty_like(x), np.empty_like(x)
    arrays = [address(array) for array in (x, skip, weight, bias, normed, total)]
    job = AddNormJob(*arrays, len(x), x.shape[1], 1e-5, is_layer_norm)
    library.headrace_add_norm(ctypes.byref(job), threads)
    return normed, total


def gate_up(
    library: ctypes.CDLL,
    stacked: NDArray[np.float32],
    *,
    is_gelu: bool = False,
    limit: float = 0,
    alpha: float = 1,
    threads: int = 1,
) -> NDArray[np.float32]:
    """activation(gate) * up of `[rows, gate | up]`, or with a limit the clamped activation."""
    gated = np.empty((len(stacked), stacked.shape[1] // 2), np.float32)
    job = GateUpJob(
        address(stacked), address(gated), len(stacked), gated.shape[1], 2 if limit else int(is_gelu), limit, alpha
    )
    library.headrace_gate_up(ctypes.byref(job), threads)
    return gated
