"""The parts of a decoder layer that TensorRT releases spell differently: norm, rotary embedding, cache, attention.

FusedOperators are opset 24's own (TensorRT 10.15 and 11, TensorRT-RTX): each becomes one layer of the network.
export/graph/portable/plain_operators.py has the same four in elementary operators.
"""

from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.model.config import ModelConfig


class Tables(NamedTuple):
    """What every layer reads: the positions of the new tokens, and cos and sin of every position."""

    position_ids: ir.Value  # int64 [B, S]
    write_idx: ir.Value  # int64 [B]
    cos: ir.Value  # [max_len, head_dim / 2]
    sin: ir.Value


class Attended(NamedTuple):
    """What attention gives: values `[B, heads, S, head_dim]` and the cache with the new tokens in it."""

    out: ir.Value
    key: ir.Value
    value: ir.Value


class Operators(Protocol):
    """Adds the four parts to a graph. Rank-4 tensors are `[B, heads, S, head_dim]`."""

    def begin(self, tables: Tables, past: ir.Value) -> None:
        """Called once, before the layers; `past` is any cache tensor, for its capacity."""
        ...

    def norm(self, x: ir.Value, weight: ir.Value, out: str) -> ir.Value:
        """RMSNorm over the last axis."""
        ...

    def rotate(self, x: ir.Value, out: str) -> ir.Value:
        """Rotary embedding at the new tokens' positions."""
        ...

    def attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, past: dict[str, ir.Value], layer: int
    ) -> Attended:
        """Write the new keys and values into the cache, and attend to it."""
        ...


class Masks:
    """Which slots each new token may see, one mask for each window width there is."""

    def __init__(self, g: GraphBuilder, tables: Tables, past: ir.Value) -> None:
        self._g = g
        self._made: dict[int | None, ir.Value] = {}
        one, nought = g.constant("one", np.array(1, np.int64)), g.constant("nought", np.array(0, np.int64))
        self.capacity_1d = g.op("Shape", [past], "capacity.1d", start=2, end=3)
        capacity = g.op("Squeeze", [self.capacity_1d], "capacity")
        self._slots = g.op("Range", [nought, capacity, one], "slots")  # [C], broadcast over [B, 1, S, C]
        self._positions = g.op("Unsqueeze", [tables.position_ids, g.shape_constant(1, 3)], "positions.4d")

    def for_window(self, window: int | None) -> ir.Value:
        """bool `[B, 1, S, C]`: the token itself and those before it, at most `window` of them."""
        if window not in self._made:
            g, name = self._g, "mask" if window is None else f"mask.{window}"
            seen = g.op("LessOrEqual", [self._slots, self._positions], name if window is None else f"{name}.causal")
            if window is not None:
                width = g.constant(f"window.{window}", np.array(window, np.int64))
                edge = g.op("Sub", [self._positions, width], f"{name}.edge")
                recent = g.op("Greater", [self._slots, edge], f"{name}.recent")
                seen = g.op("And", [seen, recent], name)
            self._made[window] = seen
        return self._made[window]


class FusedOperators:
    """Opset 24. The mask is boolean and made here from the positions.

    Attention's own `nonpad_kv_seqlen` input parses, and is dropped in silence by TensorRT's parser: wrong tokens.
    """

    opset = 24
    ir_version = 11

    def __init__(self, g: GraphBuilder, config: ModelConfig) -> None:
        self._g, self._config = g, config

    def begin(self, tables: Tables, past: ir.Value) -> None:
        self._tables, self._masks = tables, Masks(self._g, tables, past)

    def norm(self, x: ir.Value, weight: ir.Value, out: str) -> ir.Value:
        return self._g.op(
            "RMSNormalization", [x, weight], out, axis=-1, epsilon=self._config.rms_norm_eps, stash_type=1
        )

    def rotate(self, x: ir.Value, out: str) -> ir.Value:
        tables = self._tables
        return self._g.op("RotaryEmbedding", [x, tables.cos, tables.sin, tables.position_ids], out)

    def attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, past: dict[str, ir.Value], layer: int
    ) -> Attended:
        g = self._g
        present = {
            kv: g.op("TensorScatter", [past[kv], new, self._tables.write_idx], f"present.{layer}.{kv}", axis=2)
            for kv, new in (("k", key), ("v", value))
        }
        mask = self._masks.for_window(self._config.sliding_windows[layer])
        out = g.op("Attention", [query, present["k"], present["v"], mask], f"attn.{layer}")
        return Attended(out, present["k"], present["v"])
