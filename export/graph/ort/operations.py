"""The walker's operations in ONNX Runtime's fused operators."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.operations import GraphOperations
from export.graph.ort.attention import AttentionStep
from export.graph.ort.int8_linear import int8_linear
from export.graph.ort.linear import BlockProduct, float_or_block_linear, imported_linear, matmul_nbits, tied_lm_head
from export.graph.types import onnx_type
from export.graph.weights import GraphWeights, Weight
from export.model.description import Block, Linear, Norm, NormKind
from export.model.walker import Stream
from export.quantize.rounding.layers import Int8Layer, QuantizedLayers
from export.schemes.scheme import Storage


class PackedOperations(GraphOperations):
    """A value is packed: `[tokens of all rows, channels]`. Only `attend` sees rows.

    present: by layer, the caches with the new tokens
    multiply_blocks, multiply_int8: the operators of quantized products
    """

    multiply_blocks: BlockProduct = staticmethod(matmul_nbits)
    multiply_int8 = staticmethod(int8_linear)

    def __init__(self, g: GraphBuilder, weights: GraphWeights, storage: Storage, layers: QuantizedLayers) -> None:
        super().__init__(g, weights, onnx_type(storage.compute))
        self._storage, self._layers = storage, layers
        self.present: list[dict[str, ir.Value]] = []

    @abstractmethod
    def norm(self, x: ir.Value, norm: Norm) -> ir.Value: ...

    @abstractmethod
    def add_norm(self, stream: Stream[ir.Value], norm: Norm) -> tuple[ir.Value, ir.Value]: ...

    @abstractmethod
    def attend(self, qkv: ir.Value, block: Block) -> ir.Value: ...

    def product(self, x: ir.Value, linear: Linear, weight: Weight, out: str) -> ir.Value:
        stored = self._layers.take(linear)
        if isinstance(stored, Int8Layer):
            return self.multiply_int8(self.g, x, weight, stored, out)
        if stored is not None:
            return imported_linear(self.g, x, weight, stored, out, self.multiply_blocks)
        return float_or_block_linear(self.g, x, weight, self._storage, out, self.multiply_blocks)

    def tied_logits(self, x: ir.Value, weight: Weight, shared: Any) -> ir.Value:
        """Logits of x `[R, K]` with the embedding's weights; `shared` comes from `embedding`."""
        return tied_lm_head(self.g, x, weight, shared, self._storage, "logits.raw", self.multiply_blocks)

    def norm_weights(self, norm: Norm) -> list[ir.Value]:
        """The weight, and the bias if there is one. A layer norm always has one, because the fused kernel needs it."""
        weight, bias = self.weights.norm(norm)
        arrays = [(f"{norm.name}.weight", weight)]
        if bias is not None:
            arrays.append((f"{norm.name}.bias", bias))
        elif norm.kind is NormKind.LAYER:
            arrays.append((f"{norm.name}.bias", np.zeros_like(weight)))
        return [self.g.array(name, array) for name, array in arrays]


class OrtOperations(PackedOperations):
    """token_idx int64 [B, S], place_idx int64 [N, 2]: from packed tokens to rows and back."""

    def __init__(
        self,
        g: GraphBuilder,
        weights: GraphWeights,
        storage: Storage,
        layers: QuantizedLayers,
        attention: AttentionStep,
        *,
        past: Sequence[Mapping[str, ir.Value]],
        token_idx: ir.Value,
        place_idx: ir.Value,
    ) -> None:
        super().__init__(g, weights, storage, layers)
        self._attention, self._past = attention, past
        self._token_idx, self._place_idx = token_idx, place_idx

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        kind = "RMSNormalization" if norm.kind is NormKind.RMS else "LayerNormalization"
        inputs = [x, *self.norm_weights(norm)]
        return self.g.op(kind, inputs, f"{x.name}/{norm.name}", axis=-1, epsilon=norm.epsilon, stash_type=1)

    def add_norm(self, stream: Stream[ir.Value], norm: Norm) -> tuple[ir.Value, ir.Value]:
        """Sum and norm in one kernel."""
        kind = "SkipSimplifiedLayerNormalization" if norm.kind is NormKind.RMS else "SkipLayerNormalization"
        inputs = [stream.value, stream.addend, *self.norm_weights(norm)]
        names = [norm.name, "", "", f"{norm.name}.residual"]
        normed, _, _, total = self.g.ops(kind, inputs, names, domain=MICROSOFT, epsilon=norm.epsilon)
        return normed, total

    def silu(self, x: ir.Value, out: str) -> ir.Value:
        """QuickGelu with alpha 1 is SiLU in one kernel, for float32 only."""
        if self.compute == ir.DataType.FLOAT:
            return self.g.op("QuickGelu", [x], out, domain=MICROSOFT, alpha=1.0)
        return self.g.op("Mul", [x, self.g.op("Sigmoid", [x], f"{out}.sigmoid")], out)

    def attend(self, qkv: ir.Value, block: Block) -> ir.Value:
        g, a, name = self.g, block.attention, f"layers.{block.layer}"
        packed = g.op("Gather", [qkv, self._token_idx], f"{name}.qkv.rows", axis=0)
        query: list[ir.Value | None] = [packed, None, None]
        if a.q_norm is not None and a.k_norm is not None:
            sizes = g.shape_constant(a.q_size, a.kv_size, a.kv_size)
            q, k, v = g.ops("Split", [packed, sizes], [f"{name}.{part}" for part in "qkv"], axis=-1)
            query = [self._head_norm(q, a.q_norm, a.num_heads), self._head_norm(k, a.k_norm, a.num_kv_heads), v]
        out, key, value = self._attention.attend(block, query, self._past[block.layer], self.sinks(a, self.compute))
        self.present.append({"k": key, "v": value})
        return g.op("GatherND", [out, self._place_idx], f"{name}.attended")

    def _head_norm(self, x: ir.Value, norm: Norm, num_heads: int) -> ir.Value:
        """A norm over each head of `[B, S, num_heads * head_dim]`."""
        g = self.g
        heads = g.op("Reshape", [x, g.shape_constant(0, 0, num_heads, norm.size)], f"{x.name}.heads")
        return g.op("Reshape", [self.norm(heads, norm), g.shape_constant(0, 0, num_heads * norm.size)],
                    f"{x.name}.normed")  # fmt: skip
