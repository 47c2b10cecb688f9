"""The decoder as a graph for ONNX Runtime: one signature for prefill, decode, chunked prefill and ragged rows.

    inputs   input_ids   int64 [N]      new tokens of all rows, packed: no padding
             token_idx   int64 [B, S]   which of them stands at each place of each row, left-aligned; any as padding
             place_idx   int64 [N, 2]   row and place of each token, the reverse
             past_len    int32 [B]      tokens already in the row's cache
             query_len   int32 [B]      new tokens of the row, 0 = idle
             logits_idx  int64 [R]      tokens whose logits are wanted
             past.L.k/v  [B, kv_heads, capacity, head_dim], in the compute type or int8
    outputs  logits      float32 [R, vocab_size]
             present.L.k/v              bind to the memory of past.L.k/v: written in place

Attention is com.microsoft.GroupQueryAttention with its rotary embedding, packed QKV and `query_seqlens`; attention.py
and int8_attention.py add it. Only attention knows rows: all else runs over packed tokens, so that rows of different
lengths share a run without paying for padding. Laying tokens out in rows and back costs less than can be measured in a
step of 15 ms.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.checkpoint.protocol import Checkpoint
from export.graph.attention import Attention, AttentionInputs, FloatAttention
from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.int8_attention import Int8Attention
from export.graph.int8_linear import int8_linear, layer_of
from export.graph.linear import embedding, linear, tied_lm_head
from export.model.config import ModelConfig
from export.model.layer_weights import LayerWeights, Weight
from export.model.precision import Precision
from export.model.rope import rope_tables
from export.quantize.rounding.int8 import Int8Layers
from export.quantize.statistics.kv_scales import KvScales


class DecoderGraph:
    """Builds the `ort` dialect of one checkpoint; weights are read and written layer by layer."""

    def __init__(
        self,
        g: GraphBuilder,
        checkpoint: Checkpoint,
        config: ModelConfig,
        precision: Precision,
        max_len: int,
        int8_layers: Int8Layers | None = None,
        kv_scales: Sequence[KvScales] | None = None,
    ) -> None:
        """kv_scales: of an int8 cache, by layer; None is a cache of the compute type."""
        self.g, self.config, self.precision, self.max_len = g, config, precision, max_len
        self.int8_layers, self.kv_scales = int8_layers or {}, kv_scales
        self.kv_dtype = precision.compute if kv_scales is None else ir.DataType.INT8
        self.weights = LayerWeights(checkpoint, precision.numpy_dtype)

    def build(self) -> None:
        """Embed, run the layers, norm, pick the wanted rows, project to the vocabulary."""
        c, g = self.config, self.g
        self._declare_inputs()
        embed = self.weights.matrix(["model.embed_tokens.weight"], "embedding", c.vocab_size, c.hidden_size)
        residual, shared = embedding(g, self.ids, embed, self.precision, "embed")
        hidden = self._norm(residual, "model.layers.0.input_layernorm", "hidden.0")
        for layer in range(c.num_layers):
            hidden, residual = self._layer(layer, hidden, residual)
        wanted = g.op("Gather", [hidden, self.logits_idx], "hidden.wanted", axis=0)
        if c.tie_word_embeddings:
            logits = tied_lm_head(g, wanted, embed, shared, self.precision, "logits.raw")
        else:
            head = self.weights.matrix(["lm_head.weight"], "lm_head", c.vocab_size, c.hidden_size)
            logits = self._product(wanted, head, "logits.raw")
        g.output(g.op("Cast", [logits], "logits", to=ir.DataType.FLOAT), ir.DataType.FLOAT, ["R", c.vocab_size])
        for layer in range(c.num_layers):
            for kv in "kv":
                g.output(self.present[layer][kv], self.kv_dtype, self._cache_shape())

    def _declare_inputs(self) -> None:
        g, c = self.g, self.config
        self.ids = g.input("input_ids", ir.DataType.INT64, ["N"])
        self.token_idx = g.input("token_idx", ir.DataType.INT64, ["B", "S"])
        self.place_idx = g.input("place_idx", ir.DataType.INT64, ["N", 2])
        past_len = g.input("past_len", ir.DataType.INT32, ["B"])
        query_len = g.input("query_len", ir.DataType.INT32, ["B"])
        self.logits_idx = g.input("logits_idx", ir.DataType.INT64, ["R"])
        self.past = [
            {kv: g.input(f"past.{layer}.{kv}", self.kv_dtype, self._cache_shape()) for kv in "kv"}
            for layer in range(c.num_layers)
        ]
        self.present: list[dict[str, ir.Value]] = []
        one = g.constant("one", np.array(1, np.int32))
        total = g.op("Add", [past_len, query_len], "total_len")
        # The kernel wants length minus one, and at least 0 even for an idle row of an empty slot.
        last_idx = g.op("Sub", [g.op("Max", [total, one], "total_len.min1"), one], "last_idx")
        shape = g.op("Shape", [self.past[0]["k"]], "capacity.long", start=2, end=3)
        capacity = g.op("Cast", [g.op("Squeeze", [shape], "capacity.scalar")], "capacity", to=ir.DataType.INT32)
        # One position more than a slot may hold: a run may write a token of padding behind a full one.
        tables = rope_tables(c.rope, c.head_dim, self.max_len + 1)
        cos = g.array("rope.cos", tables.cos.astype(self.precision.numpy_dtype, copy=False))
        sin = g.array("rope.sin", tables.sin.astype(self.precision.numpy_dtype, copy=False))
        inputs = AttentionInputs(self.token_idx, past_len, query_len, last_idx, capacity, cos, sin)
        self.attention: Attention = (
            FloatAttention(g, c, inputs) if self.kv_scales is None else Int8Attention(g, c, inputs, self.kv_scales)
        )

    def _layer(self, layer: int, hidden: ir.Value, residual: ir.Value) -> tuple[ir.Value, ir.Value]:
        """One block: hidden is already normed; returns the next block's normed hidden and the residual stream."""
        prefix, last = f"model.layers.{layer}", layer + 1 == self.config.num_layers
        attended = self._attention(layer, hidden)
        hidden, residual = self._add_norm(residual, attended, f"{prefix}.post_attention_layernorm", f"mlp_in.{layer}")
        out = self._mlp(layer, hidden)
        next_norm = "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm"
        return self._add_norm(residual, out, next_norm, f"hidden.{layer + 1}")

    def _attention(self, layer: int, hidden: ir.Value) -> ir.Value:
        c, g, prefix = self.config, self.g, f"model.layers.{layer}.self_attn"
        names = [f"{prefix}.{proj}_proj" for proj in "qkv"]
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        tokens = self._linear(names, "qkv", hidden, q_size + 2 * kv_size, c.hidden_size, c.qkv_bias, f"qkv.{layer}")
        packed = g.op("Gather", [tokens, self.token_idx], f"qkv.{layer}.rows", axis=0)
        query: list[ir.Value | None] = [packed, None, None]
        if c.qk_norm:
            sizes = g.shape_constant(q_size, kv_size, kv_size)
            q, k, v = g.ops("Split", [packed, sizes], [f"{part}.{layer}" for part in "qkv"], axis=-1)
            query = [self._head_norm(q, f"{prefix}.q_norm", c.num_heads, f"q_normed.{layer}"),
                     self._head_norm(k, f"{prefix}.k_norm", c.num_kv_heads, f"k_normed.{layer}"), v]  # fmt: skip
        out, key, value = self.attention.attend(layer, query, self.past[layer])
        self.present.append({"k": key, "v": value})
        tokens = g.op("GatherND", [out, self.place_idx], f"attn.{layer}.tokens")
        return self._linear([f"{prefix}.o_proj"], "o", tokens, c.hidden_size, q_size, c.o_bias, f"o.{layer}")

    def _mlp(self, layer: int, hidden: ir.Value) -> ir.Value:
        """down(silu(gate(x)) * up(x)); QuickGelu with alpha 1 is SiLU in one kernel."""
        c, g, prefix = self.config, self.g, f"model.layers.{layer}.mlp"
        both = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        gate_up = self._linear(
            both, "gate_up", hidden, 2 * c.intermediate_size, c.hidden_size, c.mlp_bias, f"gu.{layer}"
        )
        gate, up = g.ops("Split", [gate_up], [f"gate.{layer}", f"up.{layer}"], axis=-1, num_outputs=2)
        if self.precision.compute == ir.DataType.FLOAT:
            activated = g.op("QuickGelu", [gate], f"silu.{layer}", domain=MICROSOFT, alpha=1.0)
        else:
            sigmoid = g.op("Sigmoid", [gate], f"sigmoid.{layer}")
            activated = g.op("Mul", [gate, sigmoid], f"silu.{layer}")
        product = g.op("Mul", [activated, up], f"gated.{layer}")
        down = [f"{prefix}.down_proj"]
        return self._linear(down, "down", product, c.hidden_size, c.intermediate_size, c.mlp_bias, f"down.{layer}")

    def _linear(
        self, names: Sequence[str], kind: str, x: ir.Value, n: int, k: int, has_bias: bool, out: str
    ) -> ir.Value:
        """One or more projections of the same input as one matrix product, biases added."""
        weight = self.weights.matrix([f"{name}.weight" for name in names], kind, n, k)
        y = self._product(x, weight, f"{out}.product" if has_bias else out)
        if not has_bias:
            return y
        bias = self.weights.vector(*[f"{name}.bias" for name in names])
        return self.g.op("Add", [y, self.g.array(f"{weight.name}.bias", bias)], out)

    def _product(self, x: ir.Value, weight: Weight, out: str) -> ir.Value:
        layer = layer_of(weight, self.int8_layers)
        if layer is not None:
            return int8_linear(self.g, x, weight, layer, out)
        return linear(self.g, x, weight, self.precision, out)

    def _norm(self, x: ir.Value, name: str, out: str) -> ir.Value:
        return self.g.op("RMSNormalization", [x, self._norm_weight(name)], out,
                         axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1)  # fmt: skip

    def _head_norm(self, x: ir.Value, name: str, num_heads: int, out: str) -> ir.Value:
        """RMSNorm over each head of `[B, S, num_heads * head_dim]`."""
        g, dim = self.g, self.config.head_dim
        heads = g.op("Reshape", [x, g.shape_constant(0, 0, num_heads, dim)], f"{out}.heads")
        normed = self._norm(heads, name, f"{out}.normed")
        return g.op("Reshape", [normed, g.shape_constant(0, 0, num_heads * dim)], out)

    def _add_norm(self, residual: ir.Value, x: ir.Value, name: str, out: str) -> tuple[ir.Value, ir.Value]:
        """Add x to the residual stream and norm the sum: (normed, sum), in one kernel."""
        normed, _, _, total = self.g.ops(
            "SkipSimplifiedLayerNormalization", [residual, x, self._norm_weight(name)],
            [out, "", "", f"{out}.residual"], domain=MICROSOFT, epsilon=self.config.rms_norm_eps,
        )  # fmt: skip
        return normed, total

    def _norm_weight(self, name: str) -> ir.Value:
        return self.g.array(f"{name}.weight", self.weights.vector(f"{name}.weight"))

    def _cache_shape(self) -> list[int | str]:
        return ["B", self.config.num_kv_heads, "capacity", self.config.head_dim]
