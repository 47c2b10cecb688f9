"""Norm, rotary embedding, cache and attention in elementary operators, for TensorRT releases before 10.15.

JetPack 6 ships TensorRT 10.3, which has neither IAttention nor IKVCacheUpdate, and whose parser ends at opset 21:
MatMul, Softmax and ScatterND it is. The query heads of a group are folded into rows, so that keys and values are
never repeated. Same interface and same numbers as FusedOperators in export/graph/portable/operators.py.
"""

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.portable.operators import Attended, Masks, Tables
from export.model.config import ModelConfig

_MASKED = -3e4
"""Added to a score that must not count: below any real one, and inside half precision's range of 65,504."""


class PlainOperators:
    """Opset 21, the first with 4-bit integers; of its new operators nothing else is used."""

    opset = 21
    ir_version = 10

    def __init__(self, g: GraphBuilder, config: ModelConfig) -> None:
        self._g, self._config = g, config

    def begin(self, tables: Tables, past: ir.Value) -> None:
        g = self._g
        self._tables = tables
        self._masks = Masks(g, tables, past)
        assert tables.cos.dtype is not None
        self._compute = tables.cos.dtype
        self._num_new = g.op("Shape", [tables.position_ids], "num_new", start=1, end=2)
        angles = g.shape_constant(1)  # [B, S, d / 2] to [B, 1, S, d / 2]
        self._cos, self._sin = (
            g.op("Unsqueeze", [g.op("Gather", [table, tables.position_ids], f"{name}.3d", axis=0), angles], name)
            for name, table in (("cos", tables.cos), ("sin", tables.sin))
        )
        self._scatter_idx = self._make_scatter_idx(tables)

    def norm(self, x: ir.Value, weight: ir.Value, out: str) -> ir.Value:
        """x / sqrt(mean(x^2) + epsilon) * weight, all float32."""
        g = self._g
        square = g.op("Mul", [x, x], f"{out}.square")
        mean = g.op("ReduceMean", [square, g.shape_constant(-1)], f"{out}.mean", keepdims=1)
        epsilon = g.constant("epsilon", np.array(self._config.rms_norm_eps, np.float32))
        root = g.op("Sqrt", [g.op("Add", [mean, epsilon], f"{out}.mean_eps")], f"{out}.root")
        return g.op("Mul", [g.op("Div", [x, root], f"{out}.unit"), weight], out)

    def rotate(self, x: ir.Value, out: str) -> ir.Value:
        """Rotate pairs (i, i + head_dim / 2) by their position's angle."""
        g, half = self._g, self._config.head_dim // 2
        first, second = g.ops("Split", [x, g.shape_constant(half, half)], [f"{out}.a", f"{out}.b"], axis=-1)
        a = g.op("Sub", [g.op("Mul", [first, self._cos], f"{out}.ac"), g.op("Mul", [second, self._sin], f"{out}.bs")],
                 f"{out}.first")  # fmt: skip
        b = g.op("Add", [g.op("Mul", [second, self._cos], f"{out}.bc"), g.op("Mul", [first, self._sin], f"{out}.as")],
                 f"{out}.second")  # fmt: skip
        return g.op("Concat", [a, b], out, axis=-1)

    def attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, past: dict[str, ir.Value], layer: int
    ) -> Attended:
        g, c = self._g, self._config
        present = {}
        for kv, new in (("k", key), ("v", value)):
            rows = g.op("Transpose", [new], f"{kv}.{layer}.rows", perm=[0, 2, 1, 3])
            present[kv] = g.op("ScatterND", [past[kv], self._scatter_idx, rows], f"present.{layer}.{kv}")
        group, kv_heads, dim, name = c.num_heads // c.num_kv_heads, c.num_kv_heads, c.head_dim, f"attn.{layer}"
        # [B, heads, S, d] is [B, kv_heads, group, S, d] in memory: the group's rows lie one after another.
        folded = g.op("Reshape", [query, g.shape_constant(0, kv_heads, -1, dim)], f"{name}.folded")
        scale = g.constant("attention.scale", np.array(dim**-0.5, self._compute.numpy()))
        scaled = g.op("Mul", [folded, scale], f"{name}.scaled")
        turned = g.op("Transpose", [present["k"]], f"{name}.keys", perm=[0, 1, 3, 2])
        scores = g.op("MatMul", [scaled, turned], f"{name}.scores")
        weights = self._softmax(scores, group, layer)
        narrow = g.op("Cast", [weights], f"{name}.weights", to=self._compute)
        mixed = g.op("MatMul", [narrow, present["v"]], f"{name}.mixed")
        out = g.op("Reshape", [mixed, g.shape_constant(0, c.num_heads, -1, dim)], name)
        return Attended(out, present["k"], present["v"])

    def _softmax(self, scores: ir.Value, group: int, layer: int) -> ir.Value:
        """Softmax in float32 of `[B, kv_heads, group * S, C]`, masked slots at 0."""
        g, c, name = self._g, self._config, f"attn.{layer}"
        wide = g.op("Cast", [scores], f"{name}.scores.float32", to=ir.DataType.FLOAT)
        unfolded_shape = g.op(
            "Concat",
            [g.shape_constant(0, c.num_kv_heads, group), self._num_new, g.shape_constant(-1)],
            f"{name}.unfolded_shape",
            axis=0,
        )
        unfolded = g.op("Reshape", [wide, unfolded_shape], f"{name}.unfolded")
        mask = self._masks.for_window(c.sliding_windows[layer])  # [B, 1, S, C]
        seen = g.op("Unsqueeze", [mask, g.shape_constant(1)], f"{name}.mask")
        masked = g.op("Where", [seen, unfolded, g.constant("masked", np.array(_MASKED, np.float32))], f"{name}.masked")
        weights = g.op("Softmax", [masked], f"{name}.softmax", axis=-1)
        shape = g.op(
            "Concat",
            [g.shape_constant(0, c.num_kv_heads, -1), self._masks.capacity_1d],
            f"{name}.folded_shape",
            axis=0,
        )
        return g.op("Reshape", [weights, shape], f"{name}.softmax.folded")

    def _make_scatter_idx(self, tables: Tables) -> ir.Value:
        """int64 `[B, S, kv_heads, 3]`: (row, head, slot) of every new key and value."""
        g, kv_heads = self._g, self._config.num_kv_heads
        nought, one = g.constant("nought", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
        batch = g.op("Shape", [tables.position_ids], "scatter.batch", start=0, end=1)
        count = g.op("Squeeze", [batch], "scatter.batch.scalar")
        num_new = g.op("Squeeze", [self._num_new], "num_new.scalar")
        steps = g.op("Range", [nought, num_new, one], "scatter.steps.1d")
        steps = g.op("Unsqueeze", [steps, g.shape_constant(0, 2, 3)], "scatter.steps")  # [1, S, 1, 1]
        first = g.op("Unsqueeze", [tables.write_idx, g.shape_constant(1, 2, 3)], "scatter.first")  # [B, 1, 1, 1]
        slots = g.op("Add", [first, steps], "scatter.slots")  # [B, S, 1, 1]
        rows = g.op("Range", [nought, count, one], "scatter.rows.1d")
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
