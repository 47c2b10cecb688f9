"""Attention over an int8 cache with one scale per channel. An If chooses one of two branches in each run.

    S = 1   GroupQueryAttention over the int8 cache: it quantizes the new key and value, writes them, and dequantizes
            the cache in registers. A step of 32 rows reads a quarter of the bytes of float32.
    S > 1   For a chunk, that kernel takes 2.3 to 4 times as long as float32. So a chunk's keys and values are rotated,
            quantized and written by other operators, and float32 attention reads the dequantized cache:

            k, v -> rotate k -> quantize -> TensorScatter into the cache
                                   `--> dequantize -------------------.
            the cache's first max(past_len) positions -> dequantize -> GroupQueryAttention in float32

Both branches read quantized keys and values, those of the chunk included, and quantize them to the same bits. So a
token's result depends on how its prompt was cut into chunks only by the order of float32 sums, and cached prompts can
be reused. Float keys for the chunk's own tokens would be a little closer to the unquantized model, but results would
depend on the cuts.

Time of attention relative to float32 (9 query heads of 64, 3 key-value heads, AVX2): 128 tokens after none, 128 after
384, 512 after none: int8 kernel 2.7, 2.9, 4.0; the chunk branch 1.16, 1.04, 1.03. One token in 32 rows after 200 and
500 tokens: 0.76 and 0.64. TensorScatter's input and output are bound to the same memory, so it writes in place.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.operations import CachedValues
from export.graph.ort.attention import CacheInputs, RotaryStep, kernel_attributes, kernel_rotates, tables_of
from export.model.description import Block
from export.quantize.statistics.kv_scales import KvScales
from runtime.errors import UnsupportedModel

INT8_KV_OPSETS = {"": 24, MICROSOFT: 1}  # 24 is the first with TensorScatter


class Int8Attention:
    """Builds both branches of every layer; values that layers share are computed once per run."""

    def __init__(self, g: GraphBuilder, inputs: CacheInputs, scales: Mapping[int, KvScales]) -> None:
        self._g, self._inputs, self._scales, self.rotate = g, inputs, scales, RotaryStep(g, inputs)
        # Outside the branches, because both may read the positions.
        self.rotate.make_positions()
        one = g.constant("one", np.array(1, np.int64))
        size = g.op("Squeeze", [g.op("Shape", [inputs.token_idx], "chunk.shape", start=1, end=2)], "chunk.len")
        self._is_chunk = g.op("Greater", [size, one], "is_chunk")
        self._write_idx = g.op("Cast", [inputs.past_len], "write_idx", to=ir.DataType.INT64)
        longest = g.op("ReduceMax", [self._write_idx], "longest_past", keepdims=0)
        self._num_read = g.op("Unsqueeze", [longest, g.shape_constant(0)], "num_read")
        # Capacity of the float32 kernel's cache, which exists for one layer: the longest row.
        total = g.op("Add", [longest, size], "chunk.total")
        self._total = g.op("Cast", [total], "chunk.capacity", to=ir.DataType.INT32)

    def attend(
        self,
        block: Block,
        query: Sequence[ir.Value | None],
        past: Mapping[str, ir.Value],
        sinks: ir.Value | None,
    ) -> CachedValues:
        """As `AttentionStep.attend`."""
        if block.attention.alibi:
            raise UnsupportedModel("an int8 KV cache has no ALiBi; leave out --kv int8 for this model")
        g, layer, types = self._g, block.layer, (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT8)
        names = [f"layers.{layer}.attention", f"present.{layer}.k", f"present.{layer}.v"]
        one = g.branch(f"decode.{layer}", types, lambda: self._one_token(block, query, past, sinks))
        chunk = g.branch(f"chunk.{layer}", types, lambda: self._chunk(block, query, past, sinks))
        return CachedValues(*g.ops("If", [self._is_chunk], names, then_branch=chunk, else_branch=one))

    def _one_token(
        self,
        block: Block,
        query: Sequence[ir.Value | None],
        past: Mapping[str, ir.Value],
        sinks: ir.Value | None,
    ) -> list[ir.Value]:
        g, shared, layer = self._g, self._inputs, block.layer
        none: list[ir.Value | None] = [None]  # position_ids and bias before the sinks; norms after the scales
        steps = [self._step(layer, kv, (-1,)) for kv in "kv"]
        rotates = kernel_rotates(block.attention)
        if not rotates:
            query = self.rotate(query, block.attention, f"decode.{layer}.turned")
        return g.ops(
            "GroupQueryAttention",
            [*query, past["k"], past["v"], shared.last_idx, shared.capacity, *tables_of(block.attention, shared),
             *none * 2, sinks, *steps, *none * 2, shared.query_len],
            [f"decode.{layer}.{part}" for part in ("attention", "k", "v")],
            domain=MICROSOFT,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=8,
            **kernel_attributes(block.attention, rotates=rotates),
        )  # fmt: skip

    def _chunk(
        self,
        block: Block,
        query: Sequence[ir.Value | None],
        past: Mapping[str, ir.Value],
        sinks: ir.Value | None,
    ) -> list[ir.Value]:
        g, a, shared, layer = self._g, block.attention, self._inputs, block.layer
        prefix = f"chunk.{layer}"
        q, k, v = self.rotate(query, a, prefix)
        fresh: list[ir.Value] = []
        floats: list[ir.Value] = []
        present: list[ir.Value] = []
        for kv, x in (("k", k), ("v", v)):
            assert x is not None
            small = self._quantize(x, layer, kv)
            fresh.append(self._dequantize(small, layer, kv, (-1,), f"{prefix}.{kv}.fresh"))
            heads = g.op("Reshape", [small, g.shape_constant(0, 0, a.num_kv_heads, a.head_dim)], f"{prefix}.{kv}.heads")
            rows = g.op("Transpose", [heads], f"{prefix}.{kv}.rows", perm=[0, 2, 1, 3])
            present.append(g.op("TensorScatter", [past[kv], rows, self._write_idx], f"{prefix}.{kv}.present", axis=2))
            axis = g.shape_constant(2)
            read = g.op("Slice", [past[kv], g.shape_constant(0), self._num_read, axis], f"{prefix}.{kv}.read")
            floats.append(self._dequantize(read, layer, kv, (a.num_kv_heads, 1, a.head_dim), f"{prefix}.{kv}.past"))
        none: list[ir.Value | None] = [None]
        optional = [*none * 4, sinks, *none * 4]  # cos, sin, position_ids, bias, sinks, scales, norms
        out = g.ops(
            "GroupQueryAttention",
            [q, *fresh, *floats, shared.last_idx, self._total, *optional, shared.query_len],
            [f"{prefix}.attention", f"{prefix}.k.all", f"{prefix}.v.all"],  # the kernel requires these outputs
            domain=MICROSOFT,
            **kernel_attributes(a, rotates=False),
        )[0]
        return [out, *present]

    def _quantize(self, x: ir.Value, layer: int, kv: str) -> ir.Value:
        """Quantize to int8 [B, S, kv_heads * head_dim].

        QuantizeLinear with scales along the last axis is slow (it calls its loop per element), so x is multiplied first
        and QuantizeLinear has one scale.
        """
        g, name = self._g, f"chunk.{layer}.{kv}"
        inverse = g.constant(f"present.{layer}.{kv}.inverse", 1 / self._scales[layer].of(kv))
        unit, zero = g.constant("unit.scale", np.array(1, np.float32)), g.constant("unit.zero", np.array(0, np.int8))
        return g.op("QuantizeLinear", [g.op("Mul", [x, inverse], f"{name}.steps"), unit, zero], f"{name}.rounded")

    def _dequantize(self, small: ir.Value, layer: int, kv: str, shape: tuple[int, ...], out: str) -> ir.Value:
        """Dequantize to float32; `shape` is that of the scales."""
        steps = self._g.op("Cast", [small], f"{out}.steps", to=ir.DataType.FLOAT)
        return self._g.op("Mul", [steps, self._step(layer, kv, shape)], out)

    def _step(self, layer: int, kv: str, shape: tuple[int, ...]) -> ir.Value:
        name = f"present.{layer}.{kv}.scale.{len(shape)}d"
        return self._g.constant(name, self._scales[layer].of(kv).reshape(shape))
