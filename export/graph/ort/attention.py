"""Attention for ONNX Runtime: com.microsoft.GroupQueryAttention over a cache of the compute type, written in place.

Attention over an int8 cache (int8_attention.py) has the same interface.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.operations import CachedValues
from export.graph.rotary import RotaryTables
from export.model.description import Attention, Block, Rotary


class CacheInputs(NamedTuple):
    """Inputs of every layer's attention.

    token_idx int64 [B, S], only its shape is used; past_len, query_len int32 [B]; capacity int32 []
    last_idx int32 [B], past_len + query_len - 1 and at least 0
    """

    token_idx: ir.Value
    past_len: ir.Value
    query_len: ir.Value
    last_idx: ir.Value
    capacity: ir.Value
    tables: Mapping[Rotary, RotaryTables]


class AttentionStep(Protocol):
    """Adds a block's attention to the graph; its output is [B, S, heads * head_dim].

    rotate: the rotary embedding alone, for a block whose attention is then told of none
    """

    rotate: "RotaryStep"

    def attend(
        self,
        block: Block,
        query: Sequence[ir.Value | None],
        past: Mapping[str, ir.Value],
        sinks: ir.Value | None,
    ) -> CachedValues:
        """query: q, k and v before the rotary embedding, [B, S, heads * head_dim] each, or all three packed in the
        first; past: the layer's cache by k and v, [B, kv_heads, capacity, head_dim]; sinks [heads]."""
        ...


class RotaryStep:
    """Rotary embedding before the attention kernel: for chunks over an int8 cache, and for sizes the kernel lacks."""

    def __init__(self, g: GraphBuilder, inputs: CacheInputs) -> None:
        self._g, self._inputs = g, inputs
        self._positions: ir.Value | None = None

    def __call__(self, query: Sequence[ir.Value | None], a: Attention, name: str) -> list[ir.Value | None]:
        """Returns q, k and v [B, S, heads * head_dim], q and k rotated; `query` as in `AttentionStep.attend`."""
        g = self._g
        packed, k, v = query
        assert packed is not None
        if k is None or v is None:
            sizes = g.shape_constant(a.q_size, a.kv_size, a.kv_size)
            packed, k, v = g.ops("Split", [packed, sizes], [f"{name}.{part}" for part in ("q", "k", "v")], axis=-1)
        if a.rotary is None:
            return [packed, k, v]
        return [self._rotate(packed, a, a.num_heads, f"{name}.q.turned"),
                self._rotate(k, a, a.num_kv_heads, f"{name}.k.turned"), v]  # fmt: skip

    def make_positions(self) -> ir.Value:
        """int64 [B, S], the positions of the new tokens."""
        if self._positions is None:
            g, shared = self._g, self._inputs
            zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
            size = g.op("Squeeze", [g.op("Shape", [shared.token_idx], "row.shape", start=1, end=2)], "row.len")
            past = g.op("Cast", [shared.past_len], "row.past", to=ir.DataType.INT64)
            first = g.op("Unsqueeze", [past, g.shape_constant(1)], "row.first")
            self._positions = g.op("Add", [first, g.op("Range", [zero, size, one], "row.range")], "row.positions")
        return self._positions

    def _rotate(self, x: ir.Value, a: Attention, num_heads: int, out: str) -> ir.Value:
        assert a.rotary is not None
        attributes: dict[str, Any] = {} if a.rotary.is_whole else {"rotary_embedding_dim": a.rotary.dim}
        if a.rotary.interleaved:
            attributes["interleaved"] = 1
        inputs = [x, self.make_positions(), *self._inputs.tables[a.rotary]]
        return self._g.op("RotaryEmbedding", inputs, out, domain=MICROSOFT, num_heads=num_heads, **attributes)


class FloatAttention:
    """GroupQueryAttention over a float cache, for prefill and decode alike."""

    def __init__(self, g: GraphBuilder, inputs: CacheInputs, compute: ir.DataType) -> None:
        self._g, self._inputs, self.rotate, self._compute = g, inputs, RotaryStep(g, inputs), compute
        self._falls: ir.Value | None = None

    def attend(
        self,
        block: Block,
        query: Sequence[ir.Value | None],
        past: Mapping[str, ir.Value],
        sinks: ir.Value | None,
    ) -> CachedValues:
        """As `AttentionStep.attend`."""
        shared, name = self._inputs, f"layers.{block.layer}.attention"
        rotates = kernel_rotates(block.attention)
        if not rotates:
            query = self.rotate(query, block.attention, name)
        none: list[ir.Value | None] = [None]
        bias = self._alibi(block.attention.alibi) if block.attention.alibi else None
        optional = [*none, bias, sinks, *none * 4]  # position_ids, bias, sinks, k_scale, v_scale, q_norm, k_norm
        values = self._g.ops(
            "GroupQueryAttention",
            [*query, past["k"], past["v"], shared.last_idx, shared.capacity, *tables_of(block.attention, shared),
             *optional, shared.query_len],
            [name, f"present.{block.layer}.k", f"present.{block.layer}.v"],
            domain=MICROSOFT,
            **kernel_attributes(block.attention, rotates=rotates),
        )  # fmt: skip
        return CachedValues(*values)

    def _alibi(self, slopes: Sequence[float]) -> ir.Value:
        """[B, heads, S, capacity]: what ALiBi adds to the scores, the same in every layer."""
        if self._falls is None:
            g = self._g
            zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
            capacity = g.op("Cast", [self._inputs.capacity], "capacity.int64", to=ir.DataType.INT64)
            slots = g.op("Range", [zero, capacity, one], "alibi.slots")
            places = g.op("Unsqueeze", [self.rotate.make_positions(), g.shape_constant(1, 3)], "alibi.positions")
            ahead = g.op("Cast", [g.op("Sub", [slots, places], "alibi.ahead")], "alibi.distances",
                         to=ir.DataType.FLOAT)  # fmt: skip
            by_head = g.constant("alibi.slopes", np.array(slopes, np.float32).reshape(1, -1, 1, 1))
            wide = g.op("Mul", [ahead, by_head], "alibi.float32")
            self._falls = g.op("Cast", [wide], "alibi", to=self._compute)
        return self._falls


def kernel_rotates(attention: Attention) -> bool:
    """Whether the kernel can apply the rotary embedding: it supports multiples of 16 channels."""
    return attention.rotary is None or attention.rotary.dim % 16 == 0


def tables_of(attention: Attention, inputs: CacheInputs) -> Sequence[ir.Value | None]:
    """cos and sin for the kernel; None if it does not rotate."""
    return (
        (None, None) if attention.rotary is None or not kernel_rotates(attention) else inputs.tables[attention.rotary]
    )


def kernel_attributes(attention: Attention, *, rotates: bool) -> dict[str, Any]:
    """The kernel's attributes, without those that equal its defaults."""
    found: dict[str, Any] = {
        "num_heads": attention.num_heads,
        "kv_num_heads": attention.num_kv_heads,
        "do_rotary": int(rotates and attention.rotary is not None),
        "local_window_size": attention.window or -1,
    }
    if rotates and attention.rotary is not None and attention.rotary.interleaved:
        found["rotary_interleaved"] = 1
    if attention.scale is not None:
        found["scale"] = attention.scale
    if attention.softcap is not None:
        found["softcap"] = attention.softcap
    return found
