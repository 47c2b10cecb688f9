"""Norm, rotary embedding, cache and attention in elementary operators, for TensorRT releases before 10.15.

JetPack 6 has TensorRT 10.3, without IAttention and IKVCacheUpdate, and its parser supports opsets up to 21. The
interface and the results are those of Opset24 in attention.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.operations import CachedValues
from export.graph.standard.attention import ElementaryAttention, Masks, Tables
from export.model.description import Block, Rotary


class Opset21:
    """Opset 21, the first with 4-bit integers."""

    opset = 21
    ir_version = 10

    def __init__(self, g: GraphBuilder, compute: ir.DataType) -> None:
        self._g, self._compute = g, compute

    def begin(self, tables: Tables, past: ir.Value) -> None:
        g = self._g
        self._num_new = g.op("Shape", [tables.position_ids], "num_new", start=1, end=2)
        self._attention = ElementaryAttention(g, Masks(g, tables, past), self._num_new, self._compute)
        self._angles = {
            rotary: tuple(self._at_positions(table, tables.position_ids) for table in pair)
            for rotary, pair in tables.rotary.items()
        }
        kv_heads = past.shape[1] if past.shape is not None else None
        assert isinstance(kv_heads, int)
        self._scatter_idx = self._make_scatter_idx(tables, kv_heads)

    def rms_norm(self, x: ir.Value, weight: ir.Value, epsilon: float, out: str) -> ir.Value:
        """x / sqrt(mean(x^2) + epsilon) * weight, in float32."""
        g = self._g
        square = g.op("Mul", [x, x], f"{out}.square")
        mean = g.op("ReduceMean", [square, g.shape_constant(-1)], f"{out}.mean", keepdims=1)
        added = g.constant(f"epsilon.{epsilon:g}", np.array(epsilon, np.float32))
        root = g.op("Sqrt", [g.op("Add", [mean, added], f"{out}.mean_eps")], f"{out}.root")
        return g.op("Mul", [g.op("Div", [x, root], f"{out}.unit"), weight], out)

    def rotate(self, x: ir.Value, rotary: Rotary, out: str) -> ir.Value:
        """Rotate pairs of the first `dim` channels by their position's angle."""
        g, dim = self._g, rotary.dim
        cos, sin = self._angles[rotary]
        turning, rest = x, None
        if not rotary.is_whole:
            sizes = g.shape_constant(dim, rotary.head_dim - dim)
            turning, rest = g.ops("Split", [x, sizes], [f"{out}.turning", f"{out}.rest"], axis=-1)
        if rotary.interleaved:
            pairs = g.op("Reshape", [turning, g.shape_constant(0, 0, 0, dim // 2, 2)], f"{out}.pairs")
            halves = g.ops("Split", [pairs, g.shape_constant(1, 1)], [f"{out}.a5", f"{out}.b5"], axis=-1)
            last = g.shape_constant(-1)
            first, second = (g.op("Squeeze", [half, last], f"{out}.{x}") for half, x in zip(halves, "ab", strict=True))
        else:
            sizes = g.shape_constant(dim // 2, dim // 2)
            first, second = g.ops("Split", [turning, sizes], [f"{out}.a", f"{out}.b"], axis=-1)
        a = g.op("Sub", [g.op("Mul", [first, cos], f"{out}.ac"), g.op("Mul", [second, sin], f"{out}.bs")],
                 f"{out}.first")  # fmt: skip
        b = g.op("Add", [g.op("Mul", [second, cos], f"{out}.bc"), g.op("Mul", [first, sin], f"{out}.as")],
                 f"{out}.second")  # fmt: skip
        if rotary.interleaved:
            columns = [g.op("Unsqueeze", [half, last], f"{half.name}.5d") for half in (a, b)]
            joined = g.op("Concat", columns, f"{out}.joined", axis=-1)
            turned = g.op("Reshape", [joined, g.shape_constant(0, 0, 0, dim)], out if rest is None else f"{out}.turned")
            return turned if rest is None else g.op("Concat", [turned, rest], out, axis=-1)
        return g.op("Concat", [a, b] if rest is None else [a, b, rest], out, axis=-1)

    def attend(
        self, query: Sequence[ir.Value], past: Mapping[str, ir.Value], block: Block, sinks: ir.Value | None
    ) -> CachedValues:
        g, layer = self._g, block.layer
        present = {}
        for kv, new in zip("kv", query[1:], strict=True):
            rows = g.op("Transpose", [new], f"layers.{layer}.{kv}.rows", perm=[0, 2, 1, 3])
            present[kv] = g.op("ScatterND", [past[kv], self._scatter_idx, rows], f"present.{layer}.{kv}")
        out = self._attention(query[0], present["k"], present["v"], block, sinks)
        return CachedValues(out, present["k"], present["v"])

    def _at_positions(self, table: ir.Value, position_ids: ir.Value) -> ir.Value:
        """`[positions, d / 2]` to `[B, 1, S, d / 2]`."""
        g = self._g
        rows = g.op("Gather", [table, position_ids], f"{table.name}.3d", axis=0)
        return g.op("Unsqueeze", [rows, g.shape_constant(1)], f"{table.name}.4d")

    def _make_scatter_idx(self, tables: Tables, kv_heads: int) -> ir.Value:
        """int64 `[B, S, kv_heads, 3]`: (row, head, slot) of every new key and value."""
        g = self._g
        zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
        batch = g.op("Shape", [tables.position_ids], "scatter.batch", start=0, end=1)
        count = g.op("Squeeze", [batch], "scatter.batch.scalar")
        num_new = g.op("Squeeze", [self._num_new], "num_new.scalar")
        steps = g.op("Range", [zero, num_new, one], "scatter.steps.1d")
        steps = g.op("Unsqueeze", [steps, g.shape_constant(0, 2, 3)], "scatter.steps")  # [1, S, 1, 1]
        first = g.op("Unsqueeze", [tables.write_idx, g.shape_constant(1, 2, 3)], "scatter.first")  # [B, 1, 1, 1]
        slots = g.op("Add", [first, steps], "scatter.slots")  # [B, S, 1, 1]
        rows = g.op("Range", [zero, count, one], "scatter.rows.1d")
        rows = g.op("Unsqueeze", [rows, g.shape_constant(1, 2, 3)], "scatter.rows")  # [B, 1, 1, 1]
        heads = g.constant("scatter.heads", np.arange(kv_heads, dtype=np.int64).reshape(1, 1, -1, 1))
        # Sums with zeros broadcast all three to [B, S, kv_heads, 1].
        zero_slots = g.op("Sub", [slots, slots], "scatter.zeros")
        base = g.op("Add", [zero_slots, g.op("Sub", [heads, heads], "scatter.heads.zeros")], "scatter.base")
        parts = [
            g.op("Add", [part, base], f"scatter.{name}.full")
            for name, part in (("rows", rows), ("heads", heads), ("slots", slots))
        ]
        return g.op("Concat", parts, "scatter.idx", axis=-1)
