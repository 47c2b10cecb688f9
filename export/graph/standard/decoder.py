"""The decoder as a standard ONNX graph: one signature for prefill, decode, chunked prefill, ragged rows, verification.

    inputs   input_ids     int64 [B, S]   new tokens, left-aligned in each row
             position_ids  int64 [B, S]   their positions; past_len[b] + s, for padding too
             write_idx     int64 [B]      where the row's first new token goes: past_len
             logits_idx    int64 [R]      positions in the flattened [B * S] whose logits are wanted
             query_len     int64 [B]      new tokens of the row; only models with states have it
             past.L.k/v    [B, kv_heads, capacity, head_dim], of layers with attention
             past.L.KIND   [B, ...]       states of layers with a recurrence, see states.py
    outputs  logits        float32 [R, vocab_size]
             top_logits    float32 [R, 64]   the largest logits, in descending order
             top_ids       int64   [R, 64]   their token ids
             log_sum       float32 [R, 1]    log of the sum of exp(logits): log-probability = logit - log_sum
             present.L...                    bound to the memory of past.L...: written in place

Attention needs no query length: padding writes to slots after the valid tokens, which every valid token's mask
excludes. A state would keep the padding, so it is read at the row's length.
Weights with the same bytes as in the `ort` dialect refer to its weight file.
"""

import numpy as np
import onnx_ir as ir

from export.checkpoint.protocol import Checkpoint
from export.graph.builder import GraphBuilder
from export.graph.rotary import rotary_initializers
from export.graph.standard.attention import Dialect, Tables
from export.graph.standard.linear import StandardLinear
from export.graph.standard.operations import StandardOperations
from export.graph.states import RowStates
from export.graph.types import numpy_type, onnx_type
from export.graph.weights import GraphWeights
from export.model.description import GatedDelta, Mamba2, ModelConfig
from export.model.walker import Stream, walk_block, walk_final_norm
from export.quantize.rounding.layers import QuantizedLayers
from export.schemes.scheme import Storage

NUM_TOP = 64
"""Candidates chosen on the device. Top-k sampling uses 20 to 50; 64 have 99 % of the probability of a usual top-p."""


class StandardDecoderGraph:
    """Builds a standard dialect of one checkpoint; weights are read and written layer by layer."""

    def __init__(
        self,
        g: GraphBuilder,
        checkpoint: Checkpoint,
        config: ModelConfig,
        storage: Storage,
        *,
        max_len: int,
        dialect: Dialect,
        layers: QuantizedLayers,
    ) -> None:
        self.g, self.config, self.storage, self.max_len = g, config, storage, max_len
        self.compute, self.dtype = onnx_type(storage.compute), numpy_type(storage.compute)
        self.dialect, self.layers = dialect, layers
        self.checkpoint, self.weights = checkpoint, GraphWeights(checkpoint, np.dtype(np.float32))

    def build(self) -> None:
        """Embed, run the blocks, norm, pick the wanted rows, project to the vocabulary, pick the candidates."""
        c, g = self.config, self.g
        ops = self._declare_inputs()
        embed = self.weights.embedding(c)
        table = g.array(embed.name, embed.load().astype(self.dtype, copy=False))
        x = ops.as_stream(g.op("Gather", [table, self.ids], "embed", axis=0))
        x = ops.marked_float(ops.placed(x, self.position_ids, c.embedding, self.max_len + 1))
        stream = Stream(x, None)
        for block in c.blocks:
            stream = walk_block(ops, block, stream)
        hidden = walk_final_norm(ops, stream, c.final_norm)
        flat = g.op("Reshape", [hidden, g.shape_constant(-1, c.hidden_size)], "hidden.flat")
        wanted = g.op("Gather", [flat, self.logits_idx], "hidden.wanted", axis=0)
        if c.tie_word_embeddings:
            raw = g.op("Gemm", [wanted, table], "logits.raw", transB=1)
        else:
            raw = ops.linear(wanted, c.head.linear)
        self._declare_outputs(ops.finished(raw, c.head), ops.present)
        self.layers.check_all_taken()

    def _declare_inputs(self) -> StandardOperations:
        g, c = self.g, self.config
        self.ids = g.input("input_ids", ir.DataType.INT64, ["B", "S"])
        self.position_ids = g.input("position_ids", ir.DataType.INT64, ["B", "S"])
        write_idx = g.input("write_idx", ir.DataType.INT64, ["B"])
        self.logits_idx = g.input("logits_idx", ir.DataType.INT64, ["R"])
        query_len = g.input("query_len", ir.DataType.INT64, ["B"]) if c.has_states else None
        past = {
            block.layer: {kv: g.input(f"past.{block.layer}.{kv}", self.compute, self._cache_shape()) for kv in "kv"}
            for block in c.attention_blocks
        }
        self.states = RowStates(g, c, GraphWeights(self.checkpoint, self.dtype), self.compute)
        if query_len is not None:
            self.states.begin(write_idx, query_len)
        rotary = rotary_initializers(g, c, self.max_len, self.dtype)
        has_scan = any(isinstance(mixer, GatedDelta | Mamba2) for block in c.blocks for mixer in block.mixers)
        self.dialect.begin(Tables(self.position_ids, write_idx, rotary, has_scan), next(iter(past.values()))["k"])
        return StandardOperations(
            g,
            self.weights,
            self.compute,
            dialect=self.dialect,
            linear=StandardLinear(g, self.storage, self.layers),
            past=past,
            states=self.states,
        )

    def _declare_outputs(self, logits: ir.Value, presents: list[ir.Value]) -> None:
        g, c = self.g, self.config
        num_top = min(NUM_TOP, c.vocab_size)
        top, ids = g.ops("TopK", [logits, g.shape_constant(num_top)], ["top_logits", "top_ids"], axis=-1)
        # The largest logit is subtracted so that exp does not overflow.
        largest = g.op("Slice", [top, g.shape_constant(0), g.shape_constant(1), g.shape_constant(1)], "largest")
        exps = g.op("Exp", [g.op("Sub", [logits, largest], "logits.shifted")], "logits.exp")
        total = g.op("ReduceSum", [exps, g.shape_constant(-1)], "exp_sum", keepdims=1)
        log_sum = g.op("Add", [g.op("Log", [total], "exp_sum.log"), largest], "log_sum")
        g.output(logits, ir.DataType.FLOAT, ["R", c.vocab_size])
        g.output(top, ir.DataType.FLOAT, ["R", num_top])
        g.output(ids, ir.DataType.INT64, ["R", num_top])
        g.output(log_sum, ir.DataType.FLOAT, ["R", 1])
        for present in presents:
            g.output(present, self.compute, self._cache_shape())
        self.states.declare_outputs()

    def _cache_shape(self) -> list[int | str]:
        return ["B", self.config.num_kv_heads, "capacity", self.config.head_dim]
