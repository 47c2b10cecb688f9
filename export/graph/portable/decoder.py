"""The decoder as a graph for TensorRT: one signature for prefill, decode, chunked prefill, ragged rows, verification.

    inputs   input_ids     int64 [B, S]   new tokens, left-aligned in each row
             position_ids  int64 [B, S]   their positions; past_len[b] + s, for padding too
             write_idx     int64 [B]      where the row's first new token goes: past_len
             logits_idx    int64 [R]      positions in the flattened [B * S] whose logits are wanted
             past.L.k/v    [B, kv_heads, capacity, head_dim]
    outputs  logits        float32 [R, vocab_size]
             top_logits    float32 [R, 64]   the largest of them, falling
             top_ids       int64   [R, 64]   their token ids
             log_sum       float32 [R, 1]    log of the sum of exp(logits): log-probability = logit - log_sum
             present.L.k/v                   the caches' own memory: written in place

The residual stream and the norms are float32 whatever the compute type: TensorRT widens a norm's input in any case,
and SmolLM2-135M's largest logit error falls from 0.054 to 0.044 in fp16 (0.032 of it is the weights' own rounding).
A row needs no query length: what padding writes lies behind the valid tokens, and no valid token's mask reaches it.
Weights that have the `ort` dialect's form are named from its weight file. Which operators a TensorRT release has is
export/graph/portable/operators.py's business, how a linear layer is quantized export/graph/portable/linear.py's.
"""

import numpy as np
import onnx_ir as ir

from export.checkpoint.protocol import Checkpoint
from export.graph.builder import GraphBuilder
from export.graph.portable.linear import TrtLinear
from export.graph.portable.operators import Operators, Tables
from export.model.config import ModelConfig
from export.model.layer_weights import LayerWeights
from export.model.rope import rope_tables
from export.model.trt_precision import TrtPrecision

NUM_TOP = 64
"""Candidates picked on the device. Top-k sampling asks for 20 to 50; 64 keep 99 % of the mass of a sane top-p."""


class TrtDecoderGraph:
    """Builds a `trt` dialect of one checkpoint; weights are read and written layer by layer."""

    def __init__(
        self,
        g: GraphBuilder,
        checkpoint: Checkpoint,
        config: ModelConfig,
        precision: TrtPrecision,
        *,
        max_len: int,
        operators: Operators,
        linear: TrtLinear,
    ) -> None:
        self.g, self.config, self.precision, self.max_len = g, config, precision, max_len
        self.operators, self.linear = operators, linear
        self.weights = LayerWeights(checkpoint, np.dtype(np.float32))

    def build(self) -> None:
        """Embed, run the layers, norm, pick the wanted rows, project to the vocabulary, pick the candidates."""
        c, g = self.config, self.g
        self._declare_inputs()
        embed = self.weights.matrix(["model.embed_tokens.weight"], "embedding", c.vocab_size, c.hidden_size)
        table = g.array(embed.name, embed.load().astype(self.precision.numpy_dtype, copy=False))
        x = self._widened(g.op("Gather", [table, self.ids], "embed", axis=0))
        presents: list[ir.Value] = []
        for layer in range(c.num_layers):
            x, key, value = self._layer(layer, x)
            presents += [key, value]
        hidden = self._norm(x, "model.norm", "hidden")
        flat = g.op("Reshape", [hidden, g.shape_constant(-1, c.hidden_size)], "hidden.flat")
        wanted = g.op("Gather", [flat, self.logits_idx], "hidden.wanted", axis=0)
        if c.tie_word_embeddings:
            raw = g.op("Gemm", [wanted, table], "logits.raw", transB=1)
        else:
            head = self.weights.matrix(["lm_head.weight"], "lm_head", c.vocab_size, c.hidden_size)
            raw = self.linear(wanted, head, "logits.raw")
        self._declare_outputs(g.op("Cast", [raw], "logits", to=ir.DataType.FLOAT), presents)

    def _declare_inputs(self) -> None:
        g, c = self.g, self.config
        self.ids = g.input("input_ids", ir.DataType.INT64, ["B", "S"])
        position_ids = g.input("position_ids", ir.DataType.INT64, ["B", "S"])
        write_idx = g.input("write_idx", ir.DataType.INT64, ["B"])
        self.logits_idx = g.input("logits_idx", ir.DataType.INT64, ["R"])
        self.past = [
            {kv: g.input(f"past.{layer}.{kv}", self.precision.compute, self._cache_shape()) for kv in "kv"}
            for layer in range(c.num_layers)
        ]
        tables = rope_tables(c.rope, c.head_dim, self.max_len + 1)  # as the `ort` dialect has them: stored once
        cos = g.array("rope.cos", tables.cos.astype(self.precision.numpy_dtype, copy=False))
        sin = g.array("rope.sin", tables.sin.astype(self.precision.numpy_dtype, copy=False))
        self.operators.begin(Tables(position_ids, write_idx, cos, sin), self.past[0]["k"])

    def _declare_outputs(self, logits: ir.Value, presents: list[ir.Value]) -> None:
        g, c = self.g, self.config
        num_top = min(NUM_TOP, c.vocab_size)
        top, ids = g.ops("TopK", [logits, g.shape_constant(num_top)], ["top_logits", "top_ids"], axis=-1)
        # The largest subtracted first, or exp overflows.
        largest = g.op("Slice", [top, g.shape_constant(0), g.shape_constant(1), g.shape_constant(1)], "largest")
        exps = g.op("Exp", [g.op("Sub", [logits, largest], "logits.shifted")], "logits.exp")
        total = g.op("ReduceSum", [exps, g.shape_constant(-1)], "exp_sum", keepdims=1)
        log_sum = g.op("Add", [g.op("Log", [total], "exp_sum.log"), largest], "log_sum")
        g.output(logits, ir.DataType.FLOAT, ["R", c.vocab_size])
        g.output(top, ir.DataType.FLOAT, ["R", num_top])
        g.output(ids, ir.DataType.INT64, ["R", num_top])
        g.output(log_sum, ir.DataType.FLOAT, ["R", 1])
        for present in presents:
            g.output(present, self.precision.compute, self._cache_shape())

    def _layer(self, layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One block: the residual stream in and out, and the layer's cache."""
        g, prefix = self.g, f"model.layers.{layer}"
        hidden = self._norm(x, f"{prefix}.input_layernorm", f"attn_in.{layer}")
        attended, key, value = self._attention(layer, hidden)
        x = g.op("Add", [x, self._widened(attended)], f"residual.{layer}.attn")
        hidden = self._norm(x, f"{prefix}.post_attention_layernorm", f"mlp_in.{layer}")
        return g.op("Add", [x, self._widened(self._mlp(layer, hidden))], f"residual.{layer}"), key, value

    def _attention(self, layer: int, hidden: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        c, g, prefix = self.config, self.g, f"model.layers.{layer}.self_attn"
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        packed = self._linear(names, "qkv", hidden, (q_size + 2 * kv_size, c.hidden_size), c.qkv_bias, f"qkv.{layer}")
        sizes = g.shape_constant(q_size, kv_size, kv_size)
        parts = g.ops("Split", [packed, sizes], [f"{part}.{layer}" for part in "qkv"], axis=-1)
        query = self._heads(parts[0], c.num_heads, f"{prefix}.q_norm", f"q.{layer}")
        key = self._heads(parts[1], c.num_kv_heads, f"{prefix}.k_norm", f"k.{layer}")
        value = self._heads(parts[2], c.num_kv_heads, None, f"v.{layer}")
        query, key = (
            self.operators.rotate(query, f"q.{layer}.rotated"),
            self.operators.rotate(key, f"k.{layer}.rotated"),
        )
        out, present_key, present_value = self.operators.attend(query, key, value, self.past[layer], layer)
        rows = g.op("Transpose", [out], f"attn.{layer}.rows", perm=[0, 2, 1, 3])
        joined = g.op("Reshape", [rows, g.shape_constant(0, 0, q_size)], f"attn.{layer}.joined")
        o = self._linear([f"{prefix}.o_proj"], "o", joined, (c.hidden_size, q_size), c.o_bias, f"o.{layer}")
        return o, present_key, present_value

    def _heads(self, x: ir.Value, num_heads: int, norm: str | None, out: str) -> ir.Value:
        """`[B, S, heads * head_dim]` to `[B, heads, S, head_dim]`, each head normed where the family does that."""
        g = self.g
        heads = g.op("Reshape", [x, g.shape_constant(0, 0, num_heads, self.config.head_dim)], f"{out}.heads")
        if norm and self.config.qk_norm:
            heads = self._norm(self._widened(heads), norm, f"{out}.normed")
        return g.op("Transpose", [heads], f"{out}.4d", perm=[0, 2, 1, 3])

    def _mlp(self, layer: int, hidden: ir.Value) -> ir.Value:
        """down(silu(gate(x)) * up(x))."""
        c, g, prefix = self.config, self.g, f"model.layers.{layer}.mlp"
        shape = (2 * c.intermediate_size, c.hidden_size)
        both = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        gate_up = self._linear(both, "gate_up", hidden, shape, c.mlp_bias, f"gu.{layer}")
        sizes = g.shape_constant(c.intermediate_size, c.intermediate_size)
        gate, up = g.ops("Split", [gate_up, sizes], [f"gate.{layer}", f"up.{layer}"], axis=-1)
        silu = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"sigmoid.{layer}")], f"silu.{layer}")
        product = g.op("Mul", [silu, up], f"gated.{layer}")
        down = (c.hidden_size, c.intermediate_size)
        return self._linear([f"{prefix}.down_proj"], "down", product, down, c.mlp_bias, f"down.{layer}")

    def _linear(
        self, names: list[str], kind: str, x: ir.Value, shape: tuple[int, int], has_bias: bool, out: str
    ) -> ir.Value:
        """One or more projections of the same input as one matrix product, biases added."""
        weight = self.weights.matrix([f"{name}.weight" for name in names], kind, *shape)
        y = self.linear(x, weight, f"{out}.product" if has_bias else out)
        if not has_bias:
            return y
        bias = self.weights.vector(*[f"{name}.bias" for name in names]).astype(self.precision.numpy_dtype)
        return self.g.op("Add", [y, self.g.array(f"{weight.name}.bias", bias)], out)

    def _norm(self, x: ir.Value, name: str, out: str) -> ir.Value:
        """RMSNorm of a float32 x, in the compute type."""
        weight = self.g.array(f"{name}.weight", self.weights.vector(f"{name}.weight"))
        if self._is_float32:
            return self.operators.norm(x, weight, out)
        normed = self.operators.norm(x, weight, f"{out}.float32")
        return self.g.op("Cast", [normed], out, to=self.precision.compute)

    def _widened(self, x: ir.Value) -> ir.Value:
        return x if self._is_float32 else self.g.op("Cast", [x], f"{x.name}.float32", to=ir.DataType.FLOAT)

    @property
    def _is_float32(self) -> bool:
        return self.precision.compute == ir.DataType.FLOAT

    def _cache_shape(self) -> list[int | str]:
        return ["B", self.config.num_kv_heads, "capacity", self.config.head_dim]
