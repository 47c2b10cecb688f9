"""Attention of the `ort` dialect: com.microsoft.GroupQueryAttention over a cache of the compute type, written in place.

Attention over an int8 cache has the same interface, see int8_attention.py.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.model.config import ModelConfig


class AttentionInputs(NamedTuple):
    """What every layer's attention reads.

    token_idx int64 [B, S], for its shape; past_len, query_len int32 [B]; last_idx int32 [B], past_len + query_len - 1
    and at least 0; capacity int32 []; cos and sin [max_len + 1, head_dim / 2]
    """

    token_idx: ir.Value
    past_len: ir.Value
    query_len: ir.Value
    last_idx: ir.Value
    capacity: ir.Value
    cos: ir.Value
    sin: ir.Value


class Attended(NamedTuple):
    """Values [B, S, heads * head_dim], and the cache with the new tokens in it."""

    out: ir.Value
    key: ir.Value
    value: ir.Value


class Attention(Protocol):
    """Adds a layer's attention to the graph."""

    def attend(self, layer: int, query: Sequence[ir.Value | None], past: dict[str, ir.Value]) -> Attended:
        """query: q, k and v [B, S, heads * head_dim] each before their rotary embedding, or all three packed in the
        first; past: the layer's cache by letter, [B, kv_heads, capacity, head_dim]."""
        ...


class FloatAttention:
    """One kernel for every shape of run."""

    def __init__(self, g: GraphBuilder, config: ModelConfig, inputs: AttentionInputs) -> None:
        self._g, self._config, self._inputs = g, config, inputs

    def attend(self, layer: int, query: Sequence[ir.Value | None], past: dict[str, ir.Value]) -> Attended:
        shared, c = self._inputs, self._config
        optional: list[ir.Value | None] = [None] * 7  # position_ids, bias, sink, k_scale, v_scale, q_norm, k_norm
        values = self._g.ops(
            "GroupQueryAttention",
            [*query, past["k"], past["v"], shared.last_idx, shared.capacity, shared.cos, shared.sin, *optional,
             shared.query_len],
            [f"attn.{layer}", f"present.{layer}.k", f"present.{layer}.v"],
            domain=MICROSOFT,
            num_heads=c.num_heads,
            kv_num_heads=c.num_kv_heads,
            do_rotary=1,
            local_window_size=c.sliding_windows[layer] or -1,
        )  # fmt: skip
        return Attended(*values)
