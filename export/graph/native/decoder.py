"""The decoder as a graph for the native operators (runtime/native/), in a session of ONNX Runtime.

    inputs   input_ids   int64 [N]      new tokens of all running rows, packed
             positions   int64 [N]      of each token in its row; only models with learned positions read them
             slot        int32 [B]      where each running row lives, in any order
             past_len    int32 [B]      tokens already in the row's cache
             query_len   int32 [B]      new tokens of the row
             logits_idx  int64 [R]      tokens whose logits are wanted
             past.L.k/v  [slots, kv_heads, capacity, head_dim], the whole pool
             past.L.KIND [slots, ...]   states of layers with a recurrence, the whole pool
    outputs  logits      float32 [R, vocab_size]
             present.L...               bound to the memory of past.L...: written in place

Unlike in the `ort` dialect, attention finds rows and slots itself: no gathering, no padding, no idle rows.
"""

import onnx_ir as ir

from export.graph.native.operations import CacheInputs, NativeOperations
from export.graph.ort.decoder import DecoderGraph
from export.graph.rotary import rotary_initializers
from export.graph.types import numpy_type

NATIVE_CACHE = "float16"
"""Type of the KV cache of quantized precisions, if --kv does not say int8: half the bytes of float32.

w8a8 of SmolLM2-135M: KL to float32 0.0049 with either; with 180 tokens before, steps of 1, 8 and 32 rows take 0.96,
0.92 and 0.88 of the time, 0.87 with 1,000 before; a prompt of 512 tokens takes 1.03.
"""


class NativeDecoderGraph(DecoderGraph):
    """Builds the `native` dialect of one checkpoint."""

    def _declare_inputs(self) -> NativeOperations:
        g, c = self.g, self.config
        self.ids = g.input("input_ids", ir.DataType.INT64, ["N"])
        self.positions = g.input("positions", ir.DataType.INT64, ["N"])
        slot, past_len, query_len = (
            g.input(name, ir.DataType.INT32, ["B"]) for name in ("slot", "past_len", "query_len")
        )
        self.logits_idx = g.input("logits_idx", ir.DataType.INT64, ["R"])
        past = self._declare_caches()
        tables = rotary_initializers(g, c, self.max_len, numpy_type(self.storage.compute))
        inputs = CacheInputs(past, self.states, slot, past_len, query_len, self.positions, tables, self.kv_scales)
        return NativeOperations(g, self.weights, self.storage, self.layers, inputs)

    def _positions(self) -> ir.Value:
        return self.positions
