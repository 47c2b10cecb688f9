"""The walker's operations in ONNX Runtime's fused operators."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph.builder import MICROSOFT, GraphBuilder
from export.graph.operations import GraphOperations
from export.graph.ort.attention import AttentionStep
from export.graph.ort.int8_linear import int8_linear
from export.graph.ort.linear import BlockProduct, float_or_block_linear, imported_linear, matmul_nbits, tied_lm_head
from export.graph.recurrence import DeltaInputs, SumInputs
from export.graph.states import RowStates
from export.graph.types import onnx_type
from export.graph.weights import GraphWeights, Weight
from export.model.description import Block, Convolution, GatedDelta, Linear, Norm, NormKind, RecurrentHeads
from export.model.walker import Stream
from export.quantize.rounding.layers import Int8Layer, QuantizedLayers
from export.schemes.scheme import Storage


class PackedOperations(GraphOperations):
    """A value is packed: `[tokens of all rows, channels]`. Only `attend` sees rows.

    present: of each layer with attention in turn, the cache with the new tokens
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

    def heads(self, x: ir.Value, num_heads: int, out: str) -> ir.Value:
        return self.g.op("Reshape", [x, self.g.shape_constant(0, num_heads, -1)], out)

    def flat(self, x: ir.Value, size: int, out: str) -> ir.Value:
        return self.g.op("Reshape", [x, self.g.shape_constant(0, size)], out)

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
        past: Mapping[int, Mapping[str, ir.Value]],
        states: RowStates,
        token_idx: ir.Value,
        place_idx: ir.Value,
    ) -> None:
        super().__init__(g, weights, storage, layers)
        self._attention, self._past, self._states = attention, past, states
        self._token_idx, self._place_idx = token_idx, place_idx
        self._edges: ir.Value | None = None

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
        if a.norms_rotated:
            q, k, v = self._attention.rotate(query, a, name)
            assert q is not None and k is not None and a.q_norm is not None and a.k_norm is not None
            query = [self._head_norm(q, a.q_norm, a.q_size), self._head_norm(k, a.k_norm, a.kv_size), v]
            block = block.without_rotary()
        elif a.q_norm is not None and a.k_norm is not None:
            sizes = g.shape_constant(a.q_size, a.kv_size, a.kv_size)
            q, k, v = g.ops("Split", [packed, sizes], [f"{name}.{part}" for part in "qkv"], axis=-1)
            query = [self._head_norm(q, a.q_norm, a.q_size), self._head_norm(k, a.k_norm, a.kv_size), v]
        out, key, value = self._attention.attend(block, query, self._past[block.layer], self.sinks(a, self.compute))
        self.present.append({"k": key, "v": value})
        return g.op("GatherND", [out, self._place_idx], f"{name}.attended")

    def convolved(self, x: ir.Value, conv: Convolution, layer: int) -> ir.Value:
        name = f"layers.{layer}.conv"
        rows = self.g.op("Gather", [x, self._token_idx], f"{name}.rows", axis=0)
        return self.g.op("GatherND", [self._states.convolve(rows, conv, layer), self._place_idx], f"{name}.packed")

    def delta_rule(self, inputs: DeltaInputs, mixer: GatedDelta, layer: int) -> ir.Value:
        """One kernel, over packed tokens. Its sums do not depend on how a row is cut, or on what runs beside it."""
        state = mixer.heads.state
        out, present = self.g.ops(
            "GatedDeltaNet",
            [inputs.q, inputs.k, inputs.v, self._row_edges(), inputs.a, inputs.b, self._states.read(layer, state),
             inputs.a_log, inputs.dt_bias],
            [f"layers.{layer}.delta", f"present.{layer}.{state.kind}"],
            domain=MICROSOFT,
            qk_l2_norm=1,
            gate_activation="softplus",
            beta_activation="sigmoid",
        )  # fmt: skip
        self._states.write(layer, state, present)
        return out

    def decayed_sum(self, inputs: SumInputs, heads: RecurrentHeads, layer: int) -> ir.Value:
        """The same kernel, with another rule."""
        read = self._states.read(layer, heads.state)
        out, present = self.g.ops(
            "GatedDeltaNet",
            [inputs.q, inputs.k, inputs.v, self._row_edges(), inputs.decay, None, read],
            [f"layers.{layer}.sum", f"present.{layer}.{heads.state.kind}"],
            domain=MICROSOFT,
            update_rule="gated",
            scale=1.0,
        )
        self._states.write(layer, heads.state, present)
        return out

    def _row_edges(self) -> ir.Value:
        """int32 [B + 1]: where each row's tokens begin, and the end."""
        if self._edges is None:
            g = self.g
            ends = g.op("CumSum", [self._states.lengths[1], g.constant("zero", np.array(0, np.int64))], "row.ends")
            edges = g.op("Concat", [g.shape_constant(0), ends], "row.edges.long", axis=0)
            self._edges = g.op("Cast", [edges], "row.edges", to=ir.DataType.INT32)
        return self._edges

    def _head_norm(self, x: ir.Value, norm: Norm, size: int) -> ir.Value:
        """A norm over each head of `[B, S, size]`, or over all heads."""
        if norm.size == size:
            return self.norm(x, norm)
        g = self.g
        heads = g.op("Reshape", [x, g.shape_constant(0, 0, size // norm.size, norm.size)], f"{x.name}.heads")
        return g.op("Reshape", [self.norm(heads, norm), g.shape_constant(0, 0, size)], f"{x.name}.normed")
