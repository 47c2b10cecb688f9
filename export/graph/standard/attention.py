"""Norm, rotary embedding, cache and attention in opset 24's own operators.

TensorRT 10.15, TensorRT 11 and TensorRT-RTX have a layer for each of them. For earlier releases, plain_attention.py
builds the same from elementary operators.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.operations import CachedValues, capped
from export.graph.rotary import RotaryTables
from export.model.description import Attention, Block, Rotary

_MASKED = -3e4
"""Score of a masked slot: below any real score, and within half precision's range of 65,504."""


class Tables(NamedTuple):
    """Inputs of every layer's attention: positions of the new tokens, and the rotary tables.

    has_scan: whether another layer is a Scan
    """

    position_ids: ir.Value  # int64 [B, S]
    write_idx: ir.Value  # int64 [B]
    rotary: Mapping[Rotary, RotaryTables]
    has_scan: bool = False


class Dialect(Protocol):
    """The operations for which opsets have different operators. Rank-4 tensors are `[B, heads, S, head_dim]`."""

    opset: int
    ir_version: int

    def begin(self, tables: Tables, past: ir.Value) -> None:
        """Called once, before the layers; `past` is any cache tensor, its capacity is read."""
        ...

    def rms_norm(self, x: ir.Value, weight: ir.Value, epsilon: float, out: str) -> ir.Value:
        """Root mean square norm over the last axis of float32 values."""
        ...

    def rotate(self, x: ir.Value, rotary: Rotary, out: str) -> ir.Value:
        """Rotary embedding at the new tokens' positions."""
        ...

    def attend(
        self, query: Sequence[ir.Value], past: Mapping[str, ir.Value], block: Block, sinks: ir.Value | None
    ) -> CachedValues:
        """Write the new keys and values to the cache, and attend to it.

        query: q, k and v; past: the layer's cache, by k and v; sinks: float32 `[heads]`
        """
        ...


class Masks:
    """Attention masks, one for each window length in the model."""

    def __init__(self, g: GraphBuilder, tables: Tables, past: ir.Value) -> None:
        self._g = g
        self._made: dict[int | None, ir.Value] = {}
        self._distances: ir.Value | None = None
        one, zero = g.constant("one", np.array(1, np.int64)), g.constant("zero", np.array(0, np.int64))
        self.capacity_1d = g.op("Shape", [past], "capacity.1d", start=2, end=3)
        capacity = g.op("Squeeze", [self.capacity_1d], "capacity")
        self._slots = g.op("Range", [zero, capacity, one], "slots")  # [C], broadcast over [B, 1, S, C]
        self._positions = g.op("Unsqueeze", [tables.position_ids, g.shape_constant(1, 3)], "positions.4d")

    def distances(self) -> ir.Value:
        """float32 `[B, 1, 1, S, C]`: tokens from each slot to each new token."""
        if self._distances is None:
            g = self._g
            back = g.op("Sub", [self._positions, self._slots], "distances.int64")
            wide = g.op("Cast", [back], "distances.4d", to=ir.DataType.FLOAT)
            self._distances = g.op("Unsqueeze", [wide, g.shape_constant(1)], "distances")
        return self._distances

    def for_window(self, window: int | None) -> ir.Value:
        """bool `[B, 1, S, C]`: true for the token itself and earlier ones, at most `window` tokens in all."""
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


class ElementaryAttention:
    """Attention in MatMul and Softmax, over a cache that has the new tokens already.

    Query heads that share a key-value head become rows of one product, so keys and values are not repeated.
    """

    def __init__(self, g: GraphBuilder, masks: Masks, num_new: ir.Value, compute: ir.DataType) -> None:
        """num_new: int64 [1], S."""
        self._g, self._masks, self._num_new, self._compute = g, masks, num_new, compute

    def __call__(
        self, query: ir.Value, key: ir.Value, value: ir.Value, block: Block, sinks: ir.Value | None
    ) -> ir.Value:
        """query `[B, heads, S, d]`, key and value `[B, kv_heads, C, d]`; returns `[B, heads, S, d]`."""
        g, a, name = self._g, block.attention, f"layers.{block.layer}.attention"
        # [B, heads, S, d] has the same memory layout as [B, kv_heads, group * S, d].
        folded = g.op("Reshape", [query, g.shape_constant(0, a.num_kv_heads, -1, a.head_dim)], f"{name}.folded")
        factor = a.head_dim**-0.5 if a.scale is None else a.scale
        scale = g.constant("attention.scale", np.array(factor, self._compute.numpy()))
        scaled = g.op("Mul", [folded, scale], f"{name}.scaled")
        turned = g.op("Transpose", [key], f"{name}.keys", perm=[0, 1, 3, 2])
        scores = g.op("MatMul", [scaled, turned], f"{name}.scores")
        weights = self._softmax(scores, a, sinks, name)
        narrow = g.op("Cast", [weights], f"{name}.weights", to=self._compute)
        mixed = g.op("MatMul", [narrow, value], f"{name}.mixed")
        return g.op("Reshape", [mixed, g.shape_constant(0, a.num_heads, -1, a.head_dim)], name)

    def _softmax(self, scores: ir.Value, a: Attention, sinks: ir.Value | None, name: str) -> ir.Value:
        """Masked softmax of `[B, kv_heads, group * S, C]`, in float32."""
        g, group = self._g, a.num_heads // a.num_kv_heads
        wide = g.op("Cast", [scores], f"{name}.scores.float32", to=ir.DataType.FLOAT)
        if a.softcap is not None:
            wide = capped(g, wide, a.softcap, f"{name}.capped")
        unfolded_shape = g.op(
            "Concat",
            [g.shape_constant(0, a.num_kv_heads, group), self._num_new, g.shape_constant(-1)],
            f"{name}.unfolded_shape",
            axis=0,
        )
        unfolded = g.op("Reshape", [wide, unfolded_shape], f"{name}.unfolded")
        if a.alibi:
            slopes = np.array(a.alibi, np.float32).reshape(a.num_kv_heads, group, 1, 1)
            falls = g.op("Mul", [self._masks.distances(), g.constant("alibi", slopes)], f"{name}.falls")
            unfolded = g.op("Sub", [unfolded, falls], f"{name}.fallen")
        mask = self._masks.for_window(a.window)  # [B, 1, S, C]
        seen = g.op("Unsqueeze", [mask, g.shape_constant(1)], f"{name}.mask")
        masked = g.op("Where", [seen, unfolded, g.constant("masked", np.array(_MASKED, np.float32))], f"{name}.masked")
        if sinks is None:
            weights = g.op("Softmax", [masked], f"{name}.softmax", axis=-1)
        else:
            weights = self._with_sinks(masked, a, sinks, name)
        shape = g.op(
            "Concat",
            [g.shape_constant(0, a.num_kv_heads, -1), self._masks.capacity_1d],
            f"{name}.folded_shape",
            axis=0,
        )
        return g.op("Reshape", [weights, shape], f"{name}.softmax.folded")

    def _with_sinks(self, scores: ir.Value, a: Attention, sinks: ir.Value, name: str) -> ir.Value:
        """Softmax of `[B, kv_heads, group, S, C]` with one more column, the sinks, which is then left out."""
        g, last = self._g, self._g.shape_constant(-1)
        column = g.op("Reshape", [sinks, g.shape_constant(a.num_kv_heads, a.num_heads // a.num_kv_heads, 1, 1)],
                      f"{name}.sinks")  # fmt: skip
        highest = g.op("Max", [g.op("ReduceMax", [scores, last], f"{name}.most", keepdims=1), column], f"{name}.top")
        powers = g.op("Exp", [g.op("Sub", [scores, highest], f"{name}.below")], f"{name}.powers")
        extra = g.op("Exp", [g.op("Sub", [column, highest], f"{name}.sinks.below")], f"{name}.sinks.powers")
        total = g.op("Add", [g.op("ReduceSum", [powers, last], f"{name}.sum", keepdims=1), extra], f"{name}.total")
        return g.op("Div", [powers, total], f"{name}.softmax")


class Opset24:
    """Opset 24. The mask is boolean and computed from the positions.

    TensorRT's parser accepts Attention's `nonpad_kv_seqlen` input and ignores it, which gives wrong tokens. It refuses
    `softcap`, so attention with a softcap is built from elementary operators. Attention has no input for sinks or
    ALiBi either.
    TensorRT-RTX 1.7.1's builder crashes with Attention and Scan in one graph, so attention beside a Scan is elementary.
    """

    opset = 24
    ir_version = 11

    def __init__(self, g: GraphBuilder, compute: ir.DataType) -> None:
        self._g, self._compute = g, compute

    def begin(self, tables: Tables, past: ir.Value) -> None:
        g = self._g
        self._tables, self._masks = tables, Masks(g, tables, past)
        self._elementary: ElementaryAttention | None = None

    def rms_norm(self, x: ir.Value, weight: ir.Value, epsilon: float, out: str) -> ir.Value:
        return self._g.op("RMSNormalization", [x, weight], out, axis=-1, epsilon=epsilon, stash_type=1)

    def rotate(self, x: ir.Value, rotary: Rotary, out: str) -> ir.Value:
        cos, sin = self._tables.rotary[rotary]
        attributes: dict[str, Any] = {"interleaved": 1} if rotary.interleaved else {}
        if not rotary.is_whole:
            attributes["rotary_embedding_dim"] = rotary.dim
        return self._g.op("RotaryEmbedding", [x, cos, sin, self._tables.position_ids], out, **attributes)

    def attend(
        self, query: Sequence[ir.Value], past: Mapping[str, ir.Value], block: Block, sinks: ir.Value | None
    ) -> CachedValues:
        g, layer, a = self._g, block.layer, block.attention
        present = {
            kv: g.op("TensorScatter", [past[kv], new, self._tables.write_idx], f"present.{layer}.{kv}", axis=2)
            for kv, new in zip("kv", query[1:], strict=True)
        }
        if a.softcap is not None or a.alibi or sinks is not None or self._tables.has_scan:
            out = self._from_elements()(query[0], present["k"], present["v"], block, sinks)
            return CachedValues(out, present["k"], present["v"])
        mask = self._masks.for_window(a.window)
        scale: dict[str, Any] = {} if a.scale is None else {"scale": a.scale}
        inputs = [query[0], present["k"], present["v"], mask]
        out = g.op("Attention", inputs, f"layers.{layer}.attention", **scale)
        return CachedValues(out, present["k"], present["v"])

    def _from_elements(self) -> ElementaryAttention:
        if self._elementary is None:
            num_new = self._g.op("Shape", [self._tables.position_ids], "num_new", start=1, end=2)
            self._elementary = ElementaryAttention(self._g, self._masks, num_new, self._compute)
        return self._elementary
