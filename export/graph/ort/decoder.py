"""The decoder as a graph for ONNX Runtime: one signature for prefill, decode, chunked prefill and ragged rows.

    inputs   input_ids   int64 [N]      new tokens of all rows, packed: no padding
             token_idx   int64 [B, S]   index of the token at each place of each row, left-aligned; any index pads
             place_idx   int64 [N, 2]   row and place of each token
             past_len    int32 [B]      tokens already in the row's cache
             query_len   int32 [B]      new tokens of the row, 0 = idle
             logits_idx  int64 [R]      tokens whose logits are wanted
             past.L.k/v  [B, kv_heads, capacity, head_dim], in the compute type or int8, of layers with attention
             past.L.KIND [B, ...]       states of layers with a recurrence, see states.py
    outputs  logits      float32 [R, vocab_size]
             present.L...               bound to the memory of past.L...: written in place

Only attention sees rows. Everything else runs over packed tokens, so that padding costs nothing in a batch of rows of
different lengths. Gathering tokens into rows and back costs nothing measurable in a step of 15 ms.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from export.checkpoint.protocol import Checkpoint
from export.graph.builder import GraphBuilder
from export.graph.ort.attention import AttentionStep, CacheInputs, FloatAttention
from export.graph.ort.int8_attention import Int8Attention
from export.graph.ort.linear import embedding
from export.graph.ort.operations import OrtOperations, PackedOperations
from export.graph.rotary import rotary_initializers
from export.graph.states import RowStates
from export.graph.types import numpy_type, onnx_type
from export.graph.weights import GraphWeights
from export.model.description import ModelConfig
from export.model.walker import Stream, walk_block, walk_final_norm
from export.quantize.rounding.layers import QuantizedLayers
from export.quantize.statistics.kv_scales import KvScales
from export.schemes.scheme import Storage


class DecoderGraph:
    """Builds the `ort` dialect of one checkpoint; weights are read and written layer by layer."""

    def __init__(
        self,
        g: GraphBuilder,
        checkpoint: Checkpoint,
        config: ModelConfig,
        storage: Storage,
        max_len: int,
        layers: QuantizedLayers,
        *,
        kv: str,
        kv_scales: Mapping[int, KvScales] | None = None,
    ) -> None:
        """kv: type of the cache, by numpy's name; kv_scales: scales of an int8 cache, by layer."""
        self.g, self.config, self.storage, self.max_len = g, config, storage, max_len
        self.layers, self.kv_scales = layers, kv_scales
        self.kv_dtype = onnx_type(kv)
        self.weights = GraphWeights(checkpoint, numpy_type(storage.compute))

    def build(self) -> None:
        """Embed, run the blocks, norm, pick the wanted rows, project to the vocabulary."""
        c, g = self.config, self.g
        ops = self._declare_inputs()
        table = self.weights.embedding(c)
        embedded, shared = embedding(g, self.ids, table, self.storage, "embed")
        stream = Stream(ops.placed(embedded, self._positions(), c.embedding, self.max_len + 1), None)
        for block in c.blocks:
            stream = walk_block(ops, block, stream)
        hidden = walk_final_norm(ops, stream, c.final_norm)
        wanted = g.op("Gather", [hidden, self.logits_idx], "hidden.wanted", axis=0)
        raw = ops.tied_logits(wanted, table, shared) if c.tie_word_embeddings else ops.linear(wanted, c.head.linear)
        g.output(ops.finished(raw, c.head), ir.DataType.FLOAT, ["R", c.vocab_size])
        for present in ops.present:
            for kv in "kv":
                g.output(present[kv], self.kv_dtype, self._cache_shape())
        self.states.declare_outputs()
        self.layers.check_all_taken()

    def _declare_inputs(self) -> PackedOperations:
        g, c = self.g, self.config
        self.ids = g.input("input_ids", ir.DataType.INT64, ["N"])
        token_idx = g.input("token_idx", ir.DataType.INT64, ["B", "S"])
        self.place_idx = g.input("place_idx", ir.DataType.INT64, ["N", 2])
        self.past_len = g.input("past_len", ir.DataType.INT32, ["B"])
        query_len = g.input("query_len", ir.DataType.INT32, ["B"])
        self.logits_idx = g.input("logits_idx", ir.DataType.INT64, ["R"])
        past = self._declare_caches()
        one = g.constant("one.int32", np.array(1, np.int32))
        total = g.op("Add", [self.past_len, query_len], "total_len")
        # The kernel needs the length minus one, and at least 0, even for an idle row with an empty slot.
        last_idx = g.op("Sub", [g.op("Max", [total, one], "total_len.min1"), one], "last_idx")
        shape = g.op("Shape", [next(iter(past.values()))["k"]], "capacity.long", start=2, end=3)
        capacity = g.op("Cast", [g.op("Squeeze", [shape], "capacity.scalar")], "capacity", to=ir.DataType.INT32)
        inputs = CacheInputs(
            token_idx,
            self.past_len,
            query_len,
            last_idx,
            capacity,
            rotary_initializers(g, c, self.max_len, numpy_type(self.storage.compute)),
        )
        if c.has_states:
            self.states.begin(
                g.op("Cast", [self.past_len], "past_len.long", to=ir.DataType.INT64),
                g.op("Cast", [query_len], "query_len.long", to=ir.DataType.INT64),
            )
        attention: AttentionStep = (
            FloatAttention(g, inputs, onnx_type(self.storage.compute))
            if self.kv_scales is None
            else Int8Attention(g, inputs, self.kv_scales)
        )
        return OrtOperations(
            g, self.weights, self.storage, self.layers, attention,
            past=past, states=self.states, token_idx=token_idx, place_idx=self.place_idx,
        )  # fmt: skip

    def _declare_caches(self) -> dict[int, dict[str, ir.Value]]:
        """Inputs for K and V by layer, and for states."""
        past = {
            block.layer: {
                kv: self.g.input(f"past.{block.layer}.{kv}", self.kv_dtype, self._cache_shape()) for kv in "kv"
            }
            for block in self.config.attention_blocks
        }
        self.states = RowStates(self.g, self.config, self.weights, onnx_type(self.storage.compute))
        return past

    def _positions(self) -> ir.Value:
        """int64 [N], the position of each token; unused, and input_ids, without learned positions."""
        g = self.g
        if self.config.embedding.positions is None:
            return self.ids
        row, place = g.ops("Split", [self.place_idx], ["token.row", "token.place"], axis=1, num_outputs=2)
        past = g.op("Cast", [g.op("GatherND", [self.past_len, row], "token.past")], "token.past.long",
                    to=ir.DataType.INT64)  # fmt: skip
        return g.op("Add", [past, g.op("Squeeze", [place, g.shape_constant(1)], "token.place.1d")], "token.position")

    def _cache_shape(self) -> list[int | str]:
        return ["B", self.config.num_kv_heads, "capacity", self.config.head_dim]
