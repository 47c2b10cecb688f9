"""The walker's operations in the native operators of runtime/native/, and in ONNX Runtime's where there is none."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from export.graph.builder import MICROSOFT, NATIVE, GraphBuilder
from export.graph.native.linear import block_linear, int8_linear
from export.graph.ort.operations import PackedOperations
from export.graph.recurrence import DeltaInputs, SumInputs
from export.graph.rotary import RotaryTables
from export.graph.states import RowStates
from export.graph.weights import GraphWeights
from export.model.description import (
    Activation,
    Attention,
    Block,
    Convolution,
    GatedDelta,
    Mlp,
    Norm,
    NormKind,
    RecurrentHeads,
    Rotary,
    ShortConv,
)
from export.model.walker import Stream
from export.quantize.rounding.layers import QuantizedLayers
from export.quantize.statistics.kv_scales import KvScales
from export.schemes.scheme import Storage
from runtime.errors import UnsupportedModel

_ATTENTION = {
    ir.DataType.FLOAT: "Attention",
    ir.DataType.FLOAT16: "AttentionFloat16",
    ir.DataType.INT8: "AttentionInt8",
}
"""The operator for each type of cache."""


class CacheInputs(NamedTuple):
    """Inputs of every layer's attention.

    past: by layer, the whole pool of k and of v; states: the pools of states; slot, past_len, query_len int32 [B]
    positions: int64 [N]
    scales: of an int8 cache, by layer
    """

    past: Mapping[int, Mapping[str, ir.Value]]
    states: RowStates
    slot: ir.Value
    past_len: ir.Value
    query_len: ir.Value
    positions: ir.Value
    tables: Mapping[Rotary, RotaryTables]
    scales: Mapping[int, KvScales] | None


class NativeOperations(PackedOperations):
    """Of what has no native operator, ONNX Runtime's operators."""

    multiply_blocks = staticmethod(block_linear)
    multiply_int8 = staticmethod(int8_linear)

    def __init__(
        self, g: GraphBuilder, weights: GraphWeights, storage: Storage, layers: QuantizedLayers, inputs: CacheInputs
    ) -> None:
        super().__init__(g, weights, storage, layers)
        self._inputs = inputs

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        return self._add_norm([x, None], norm, [f"{x.name}/{norm.name}"])[0]

    def add_norm(self, stream: Stream[ir.Value], norm: Norm) -> tuple[ir.Value, ir.Value]:
        """Sum and norm in one kernel."""
        normed, total = self._add_norm([*stream], norm, [norm.name, f"{norm.name}.residual"])
        return normed, total

    def _add_norm(self, inputs: list[ir.Value | None], norm: Norm, names: Sequence[str]) -> list[ir.Value]:
        return self.g.ops(
            "AddNorm",
            [*inputs, *self.norm_weights(norm)],
            names,
            domain=NATIVE,
            epsilon=norm.epsilon,
            is_layer_norm=int(norm.kind is NormKind.LAYER),
        )

    def silu(self, x: ir.Value, out: str) -> ir.Value:
        return self.g.op("Mul", [x, self.g.op("Sigmoid", [x], f"{out}.sigmoid")], out)

    def activate(self, up: ir.Value, mlp: Mlp) -> ir.Value:
        """Split, activation and product in one kernel."""
        if not mlp.is_gated or mlp.activation not in (Activation.SILU, Activation.GELU_TANH):
            return super().activate(up, mlp)
        name = f"{mlp.down.site}.gated"
        if mlp.clamp is not None:
            limits = {"limit": mlp.clamp.limit, "alpha": mlp.clamp.alpha}
            return self.g.op("GateUp", [up], name, domain=NATIVE, **limits)
        is_gelu = int(mlp.activation is Activation.GELU_TANH)
        return self.g.op("GateUp", [up], name, domain=NATIVE, gelu=is_gelu)

    def attend(self, qkv: ir.Value, block: Block) -> ir.Value:
        g, a, shared, name = self.g, block.attention, self._inputs, f"layers.{block.layer}"
        if a.alibi:
            raise UnsupportedModel("the native operators have no ALiBi; use --dialect ort for this model")
        past = shared.past[block.layer]
        tables: Sequence[ir.Value | None] = (None, None) if a.rotary is None else shared.tables[a.rotary]
        norms: list[ir.Value | None] = [None, None]
        attributes: dict[str, Any] = {
            "num_heads": a.num_heads,
            "kv_num_heads": a.num_kv_heads,
            "scale": a.head_dim**-0.5 if a.scale is None else a.scale,
        }
        if a.q_norm is not None and a.k_norm is not None:
            if _kernel_norms(a):
                norms = [self._head_weight(a.q_norm), self._head_weight(a.k_norm)]
                attributes["epsilon"] = a.q_norm.epsilon
            else:
                qkv = self._norm_heads(qkv, block)
                tables = (None, None) if a.norms_rotated else tables
        if a.softcap is not None:
            attributes["softcap"] = a.softcap
        if a.window is not None:
            attributes["local_window_size"] = a.window
        if a.rotary is not None and a.rotary.interleaved:
            attributes["rotary_interleaved"] = 1
        out, key, value = g.ops(
            _ATTENTION[past["k"].dtype or ir.DataType.UNDEFINED],
            [qkv, past["k"], past["v"], shared.slot, shared.past_len, shared.query_len, *tables, *norms,
             *self._scales(block.layer), self.sinks(a, ir.DataType.FLOAT)],
            [f"{name}.attention", f"present.{block.layer}.k", f"present.{block.layer}.v"],
            domain=NATIVE,
            **attributes,
        )  # fmt: skip
        self.present.append({"k": key, "v": value})
        return out

    def convolve(self, x: ir.Value, mixer: ShortConv) -> ir.Value:
        """Both products and the convolution in one kernel."""
        return self._convolved(x, mixer.conv, mixer.into.site.layer, is_gated=True)

    def convolved(self, x: ir.Value, conv: Convolution, layer: int) -> ir.Value:
        return self._convolved(x, conv, layer, is_gated=False)

    def _convolved(self, x: ir.Value, conv: Convolution, layer: int, *, is_gated: bool) -> ir.Value:
        g, shared = self.g, self._inputs
        past = shared.states.past(layer, conv.state)
        taps = self.weights.tensor(f"{conv.name}.weight", (conv.size, 1, conv.width))
        weight = g.array(f"{conv.name}.weight", np.ascontiguousarray(taps[:, 0].T))
        bias = []
        if conv.has_bias:
            bias.append(g.array(f"{conv.name}.bias", self.weights.tensor(f"{conv.name}.bias", (conv.size,))))
        out, present = g.ops(
            "CausalConv",
            [x, past, shared.slot, shared.past_len, shared.query_len, weight, *bias],
            [f"layers.{layer}.conv.out", f"present.{layer}.conv"],
            domain=NATIVE,
            gated=int(is_gated),
        )
        shared.states.write(layer, conv.state, present)
        return out

    def delta_rule(self, inputs: DeltaInputs, mixer: GatedDelta, layer: int) -> ir.Value:
        gates = self.g.op("Concat", [inputs.b, inputs.a], f"layers.{layer}.gates", axis=-1)
        vectors = [inputs.a_log, inputs.dt_bias]
        return self._recurrence([inputs.q, inputs.k, inputs.v], gates, vectors, mixer.heads, layer)

    def decayed_sum(self, inputs: SumInputs, heads: RecurrentHeads, layer: int) -> ir.Value:
        return self._recurrence([inputs.q, inputs.k, inputs.v], inputs.decay, [], heads, layer)

    def _recurrence(
        self,
        parts: Sequence[ir.Value],
        gates: ir.Value,
        vectors: Sequence[ir.Value],
        heads: RecurrentHeads,
        layer: int,
    ) -> ir.Value:
        """One kernel, which takes q, k and v stacked. vectors: a_log and dt_bias of a delta rule; none of a sum."""
        g, shared, state, name = self.g, self._inputs, heads.state, f"layers.{layer}.recurrence"
        stacked = [g.op("Reshape", [x, g.shape_constant(0, -1)], f"{x.name}.flat") for x in parts]
        out, present = g.ops(
            "Recurrence",
            [g.op("Concat", stacked, f"{name}.qkv", axis=-1), gates, shared.states.past(layer, state), shared.slot,
             shared.past_len, shared.query_len, *vectors],
            [f"{name}.tokens", f"present.{layer}.{state.kind}"],
            domain=NATIVE,
            k_heads=heads.num_k_heads,
            delta=int(bool(vectors)),
        )  # fmt: skip
        shared.states.write(layer, state, present)
        return self.heads(out, heads.num_v_heads, name)

    def _scales(self, layer: int) -> list[ir.Value | None]:
        if self._inputs.scales is None:
            return [None, None]
        scales = self._inputs.scales[layer]
        return [self.g.constant(f"present.{layer}.{kv}.scale", scales.of(kv).reshape(-1)) for kv in "kv"]

    def _head_weight(self, norm: Norm) -> ir.Value:
        return self.g.array(f"{norm.name}.weight", self.weights.norm(norm).weight)

    def _norm_heads(self, qkv: ir.Value, block: Block) -> ir.Value:
        """Norms over heads that the kernel has not, before it."""
        g, a, name = self.g, block.attention, f"layers.{block.layer}"
        sizes = g.shape_constant(a.q_size, a.kv_size, a.kv_size)
        q, k, v = g.ops("Split", [qkv, sizes], [f"{name}.{part}" for part in "qkv"], axis=-1)
        parts = []
        for part, norm, size in ((q, a.q_norm, a.q_size), (k, a.k_norm, a.kv_size)):
            assert norm is not None
            x = self._rotated(part, a.rotary, size // a.head_dim) if a.rotary and a.norms_rotated else part
            heads = g.op("Reshape", [x, g.shape_constant(-1, size // norm.size, norm.size)], f"{x.name}.heads")
            parts.append(g.op("Reshape", [self.norm(heads, norm), g.shape_constant(-1, size)], f"{x.name}.normed"))
        return g.op("Concat", [*parts, v], f"{name}.qkv.normed", axis=-1)

    def _rotated(self, x: ir.Value, rotary: Rotary, num_heads: int) -> ir.Value:
        """The rotary embedding of `[N, heads * head_dim]`: rows of one token, as the operator has a longest row."""
        g, one = self.g, self.g.shape_constant(1)
        attributes: dict[str, Any] = {} if rotary.is_whole else {"rotary_embedding_dim": rotary.dim}
        if rotary.interleaved:
            attributes["interleaved"] = 1
        row = g.op("Unsqueeze", [x, one], f"{x.name}.row")
        places = g.op("Unsqueeze", [self._inputs.positions, one], f"{x.name}.positions")
        tables = self._inputs.tables[rotary]
        turned = g.op("RotaryEmbedding", [row, places, *tables], f"{x.name}.row.turned", domain=MICROSOFT,
                      num_heads=num_heads, **attributes)  # fmt: skip
        return g.op("Squeeze", [turned, one], f"{x.name}.turned")


def _kernel_norms(a: Attention) -> bool:
    """Whether the attention kernel has the norms of queries and keys: over each head, before the rotary embedding."""
    return not a.norms_rotated and all(
        norm is not None
        and norm.kind is NormKind.RMS
        and not norm.has_bias
        and norm.size == a.head_dim
        and a.q_norm is not None
        and norm.epsilon == a.q_norm.epsilon
        for norm in (a.q_norm, a.k_norm)
    )
