"""Attention for ONNX Runtime: com.microsoft.GroupQueryAttention over a cache of the compute type, written in place.

Attention over an int8 cache has the same interface, see int8_attention.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.rotary import RotaryTables
from export.model.description import Attention as AttentionConfig
from export.model.description import Block, Rotary


class CacheInputs(NamedTuple):
    """What every layer's attention reads.

    token_idx int64 [B, S], for its shape; past_len, query_len int32 [B]; last_idx int32 [B], past_len + query_len - 1
    and at least 0; capacity int32 []
    """

    token_idx: ir.Value
    past_len: ir.Value
    query_len: ir.Value
    last_idx: ir.Value
    capacity: ir.Value
    tables: Mapping[Rotary, RotaryTables]


class CachedValues(NamedTuple):
    """Values [B, S, heads * head_dim], and the cache with the new tokens in it."""

    out: ir.Value
    key: ir.Value
    value: ir.Value


class Attention(Protocol):
    """Adds a block's attention to the graph."""

    def attend(self, block: Block, query: Sequence[ir.Value | None], past: Mapping[str, ir.Value]) -> CachedValues:
        """query: q, k and v [B, S, heads * head_dim] each before their rotary embedding, or all three packed in the
        first; past: the layer's cache by letter, [B, kv_heads, capacity, head_dim]."""
        ...


class FloatAttention:
    """One kernel for every shape of run."""

    def __init__(self, g: GraphBuilder, inputs: CacheInputs) -> None:
        self._g, self._inputs = g, inputs

    def attend(self, block: Block, query: Sequence[ir.Value | None], past: Mapping[str, ir.Value]) -> CachedValues:
        """As `Attention.attend`."""
        shared, name = self._inputs, f"layers.{block.layer}.attention"
        optional: list[ir.Value | None] = [None] * 7  # position_ids, bias, sink, k_scale, v_scale, q_norm, k_norm
        values = self._g.ops(
            "GroupQueryAttention",
            [*query, past["k"], past["v"], shared.last_idx, shared.capacity, *tables_of(block.attention, shared),
             *optional, shared.query_len],
            [name, f"present.{block.layer}.k", f"present.{block.layer}.v"],
            domain=MICROSOFT,
            **kernel_attributes(block.attention),
        )  # fmt: skip
        return CachedValues(*values)


def tables_of(attention: AttentionConfig, inputs: CacheInputs) -> Sequence[ir.Value | None]:
    """cos and sin for the kernel; nothing where no channel turns."""
    return (None, None) if attention.rotary is None else inputs.tables[attention.rotary]


def kernel_attributes(attention: AttentionConfig, *, rotates: bool = True) -> dict[str, Any]:
    """Attributes of the kernel; those that equal its own defaults are left out."""
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
