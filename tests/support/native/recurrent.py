"""Calls the recurrent kernels of the native library through ctypes."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from tests.support.native.calls import address

Array = NDArray[np.float32]


class Rows(ctypes.Structure):
    """`RecurrentRows` of runtime/native/recurrent/recurrent.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slot", "past_len", "query_len")),
        ("num_slots", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
    )


class ConvolutionJob(ctypes.Structure):
    """`Convolution` of the same file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "state", "weight", "bias")),
        ("rows", Rows),
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
    )


class RecurrenceJob(ctypes.Structure):
    """`Recurrence` of the same file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "gates", "out", "state", "a_log", "dt_bias")),
        ("rows", Rows),
        *((name, ctypes.c_int32) for name in ("num_k_heads", "num_v_heads", "k_dim", "v_dim")),
    )


def recur(
    library: ctypes.CDLL,
    qkv: Array,
    gates: Array,
    state: Array,
    heads: tuple[Array, Array] | tuple[None, None],
    rows: tuple[list[int], list[int], list[int]],
    threads: int = 1,
) -> Array:
    """Run the kernel, which changes `state` `[slots, v_heads, v_dim, k_dim]`; returns `[tokens, v_heads * v_dim]`.

    qkv `[tokens, 2 * k_heads * k_dim + v_heads * v_dim]`; gates `[tokens, v_heads]`, or
    `[tokens, 2 * v_heads]` of a delta rule, which has a_log and dt_bias in `heads`
    """
    num_slots, v_heads, v_dim, k_dim = state.shape
    out = np.full((len(qkv), v_heads * v_dim), np.nan, np.float32)
    numbers = [np.array(values, np.int32) for values in rows]
    job = RecurrenceJob(
        *map(address, (qkv, gates, out, state, *heads)), Rows(*map(address, numbers), num_slots, len(rows[0])),
        (qkv.shape[1] - v_heads * v_dim) // (2 * k_dim), v_heads, k_dim, v_dim,
    )  # fmt: skip
    library.headrace_recurrence.restype = ctypes.c_char_p
    fault = library.headrace_recurrence(ctypes.byref(job), threads)
    if fault is not None:
        raise ValueError(fault.decode())
    return out


def convolve(
    library: ctypes.CDLL,
    x: Array,
    state: Array,
    weight: Array,
    bias: Array | None,
    rows: tuple[list[int], list[int], list[int]],
    *,
    is_gated: bool,
    threads: int = 1,
) -> Array:
    """Run the kernel, which changes `state`; rows: slot, past_len, query_len. ValueError with its words if it refuses.

    x `[tokens, size]`, or `[tokens, 3 * size]` if gated; state `[slots, width - 1, size]`; weight `[width, size]`
    """
    width, size = weight.shape
    out = np.full((len(x), size), np.nan, np.float32)
    numbers = [np.array(values, np.int32) for values in rows]
    job = ConvolutionJob(
        *map(address, (x, out, state, weight, bias)), Rows(*map(address, numbers), len(state), len(rows[0])),
        size, width, int(is_gated),
    )  # fmt: skip
    library.headrace_convolve.restype = ctypes.c_char_p
    fault = library.headrace_convolve(ctypes.byref(job), threads)
    if fault is not None:
        raise ValueError(fault.decode())
    return out
