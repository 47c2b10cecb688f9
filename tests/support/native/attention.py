"""Calls the attention kernel of the native library through ctypes, and a float64 model of it in numpy."""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.native.calls import address

Array = NDArray[np.float32]

CACHE_TYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8))
"""In the order of `CacheType` of runtime/native/attention/attention.h."""


class AttentionCall(ctypes.Structure):
    """`AttentionCall` of runtime/native/attention/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "out", "key_cache", "value_cache", "slot", "past_len", "query_len", "cos", "sin", "q_norm", "k_norm",
            "k_scale", "v_scale")),
        ("num_slots", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (
            "num_rows", "num_heads", "num_kv_heads", "head_dim", "rotary_dim", "is_interleaved", "window",
            "cache_type")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "epsilon")),
        ("sinks", ctypes.c_void_p),
    )  # fmt: skip


@dataclass
class Layer:
    """One attention layer: its sizes, its weights and its cache `[slots, kv_heads, capacity, head_dim]`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]
    num_slots: int
    capacity: int
    rotary_dim: int = 0
    is_interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.0
    epsilon: float = 1e-5
    has_norms: bool = False
    has_sinks: bool = False
    keys: NDArray[Any] = field(init=False)
    values: NDArray[Any] = field(init=False)
    weights: dict[str, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.num_slots, self.num_kv_heads, self.capacity, self.head_dim
        # A number that would show if a token beyond a row's own were read.
        stale = 77 if self.dtype == np.int8 else np.nan
        self.keys, self.values = np.full(shape, stale, self.dtype), np.full(shape, stale, self.dtype)
        self.scale = self.scale or self.head_dim**-0.5
        rng = np.random.default_rng(7)
        if self.rotary_dim:
            angles = rng.uniform(0, 6, (self.capacity, self.rotary_dim // 2))
            self.weights |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        if self.has_norms:
            for name in ("q_norm", "k_norm"):
                self.weights[name] = rng.uniform(0.5, 1.5, self.head_dim).astype(np.float32)
        if self.has_sinks:  # some above the scores, some below
            self.weights["sinks"] = np.linspace(-3, 5, self.num_heads).astype(np.float32)
        if self.dtype == np.int8:
            for name in ("k_scale", "v_scale"):
                steps = rng.uniform(0.02, 0.03, self.num_kv_heads * self.head_dim)
                self.weights[name] = steps.astype(np.float32)

    @property
    def width(self) -> int:
        """Of a token of qkv."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def attend(
        self, library: ctypes.CDLL, qkv: Array, slots: list[int], past: list[int], query: list[int], threads: int = 1
    ) -> Array:
        """Run the kernel; ValueError with its words if it refuses. Returns `[tokens, heads * head_dim]`."""
        out = np.full((len(qkv), self.num_heads * self.head_dim), np.nan, np.float32)
        rows = [np.array(values, np.int32) for values in (slots, past, query)]
        names = ("cos", "sin", "q_norm", "k_norm", "k_scale", "v_scale")
        qkv = np.ascontiguousarray(qkv)
        call = AttentionCall(
            address(qkv), address(out), address(self.keys), address(self.values), *map(address, rows),
            *(address(self.weights.get(name)) for name in names),
            self.num_slots, self.capacity, len(slots), self.num_heads, self.num_kv_heads, self.head_dim,
            self.rotary_dim, self.is_interleaved, self.window, CACHE_TYPES.index(self.dtype),
            self.scale, self.softcap, self.epsilon, address(self.weights.get("sinks")),
        )  # fmt: skip
        library.headrace_attend.restype = ctypes.c_char_p
        fault = library.headrace_attend(ctypes.byref(call), threads)
        if fault is not None:
            raise ValueError(fault.decode())
        return out

    def prepared(self, heads: NDArray[Any], norm: str, position: int) -> NDArray[Any]:
        """Heads `[heads, head_dim]` of one token after norm and rotary embedding, in the type that `heads` has."""
        heads = heads.copy()
        if self.has_norms:
            mean = np.square(heads).mean(-1, keepdims=True)
            heads = heads / np.sqrt(mean + self.epsilon) * self.weights[norm]
        if self.rotary_dim:
            half = self.rotary_dim // 2
            pair = (slice(0, self.rotary_dim, 2), slice(1, self.rotary_dim, 2)) if self.is_interleaved else (
                slice(0, half), slice(half, self.rotary_dim))  # fmt: skip
            cos, sin = (self.weights[name][position].astype(heads.dtype) for name in ("cos", "sin"))
            a, b = heads[:, pair[0]].copy(), heads[:, pair[1]].copy()
            heads[:, pair[0]], heads[:, pair[1]] = a * cos - b * sin, b * cos + a * sin
        return heads

    def rounded(self, heads: NDArray[Any], name: str) -> NDArray[Any]:
        """Heads as the cache stores them."""
        if self.dtype == np.int8:
            inverse = np.float32(1) / self.weights[name].reshape(self.num_kv_heads, self.head_dim)
            return np.asarray(np.clip(np.rint(heads * inverse), -128, 127).astype(np.int8))
        if self.dtype == np.float16:
            heads = np.clip(heads, -65504, 65504)
        return np.asarray(heads.astype(self.dtype))

    def expected(self, qkv: Array, slot: int, past: int) -> NDArray[np.float64]:
        """What attention to the cache gives the new tokens of one row, in float64; the cache holds their keys."""
        found = []
        group = self.num_heads // self.num_kv_heads
        for idx, token in enumerate(qkv.reshape(len(qkv), -1, self.head_dim).astype(np.float64)):
            position = past + idx
            first = max(0, position + 1 - self.window) if self.window else 0
            queries = self.prepared(token[: self.num_heads], "q_norm", position)
            keys, values = (self._read(part, slot, first, position + 1) for part in ("k", "v"))
            scores = np.einsum("kgd,ktd->kgt", queries.reshape(-1, group, self.head_dim), keys) * self.scale
            if self.softcap:
                scores = self.softcap * np.tanh(scores / self.softcap)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            total = weights.sum(-1, keepdims=True)
            if self.has_sinks:
                sinks = self.weights["sinks"].astype(np.float64).reshape(-1, group, 1)
                total += np.exp(sinks - scores.max(-1, keepdims=True))
            weights /= total
            found.append(np.einsum("kgt,ktd->kgd", weights, values).reshape(-1))
        return np.array(found)

    def _read(self, part: str, slot: int, first: int, last: int) -> NDArray[np.float64]:
        cache = (self.keys if part == "k" else self.values)[slot, :, first:last].astype(np.float64)
        if self.dtype != np.int8:
            return cache
        scales = self.weights[f"{part}_scale"].astype(np.float64)
        return np.asarray(cache * scales.reshape(self.num_kv_heads, 1, self.head_dim))
