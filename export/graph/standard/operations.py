"""The walker's operations in standard ONNX, for TensorRT and other runtimes.

The residual stream and the norms are float32 for every compute type: TensorRT casts a norm's input to float32 anyway,
and SmolLM2-135M's largest logit error in fp16 falls from 0.054 to 0.044 (rounding the weights alone gives 0.032).
attention.py has the operators of each opset, linear.py the quantized linear layers.
"""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.experts import mix_densely
from export.graph.operations import GraphOperations
from export.graph.recurrence import DeltaInputs, SumInputs
from export.graph.standard.attention import Dialect
from export.graph.standard.linear import StandardLinear
from export.graph.standard.scan import scan_delta_rule, scan_sum
from export.graph.states import RowStates
from export.graph.weights import GraphWeights, Weight
from export.model.description import (
    Block,
    Convolution,
    Experts,
    GatedDelta,
    Linear,
    Mlp,
    Norm,
    NormKind,
    RecurrentHeads,
)
from export.model.walker import Stream


class StandardOperations(GraphOperations):
    """A value is `[B, S, channels]`: float32 in the residual stream, the compute type elsewhere.

    present: the caches with the new tokens, k and v of each layer in turn
    """

    num_outer = 2

    def __init__(
        self,
        g: GraphBuilder,
        weights: GraphWeights,
        compute: ir.DataType,
        *,
        dialect: Dialect,
        linear: StandardLinear,
        past: Mapping[int, Mapping[str, ir.Value]],
        states: RowStates,
    ) -> None:
        super().__init__(g, weights, compute)
        self._dialect, self._linear, self._past, self._states = dialect, linear, past, states
        self.present: list[ir.Value] = []
        self._wide: set[str | None] = set()

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        """Returns the compute type."""
        g, out = self.g, f"{x.name}/{norm.name}"
        arrays = self.weights.norm(norm)
        weight = g.array(f"{norm.name}.weight", arrays.weight)
        bias = None if arrays.bias is None else g.array(f"{norm.name}.bias", arrays.bias)
        x = self.as_stream(x)
        is_float = self.compute == ir.DataType.FLOAT
        name = out if is_float else f"{out}.wide"
        if norm.kind is NormKind.LAYER:
            inputs = [x, weight] if bias is None else [x, weight, bias]
            y = g.op("LayerNormalization", inputs, name, axis=-1, epsilon=norm.epsilon, stash_type=1)
        else:
            y = self._dialect.rms_norm(x, weight, norm.epsilon, name)
        return y if is_float else g.op("Cast", [y], out, to=self.compute)

    def add_norm(self, stream: Stream[ir.Value], norm: Norm) -> tuple[ir.Value, ir.Value]:
        assert stream.addend is not None
        total = self.marked_float(
            self.g.op("Add", [stream.value, self.as_stream(stream.addend)], f"{norm.name}.residual")
        )
        return self.norm(total, norm), total

    def sum(self, stream: Stream[ir.Value]) -> tuple[ir.Value, ir.Value]:
        total = stream.value
        if stream.addend is not None:
            total = self.marked_float(self.add(self.as_stream(stream.addend), stream.value))
        if self.compute == ir.DataType.FLOAT:
            return total, total
        return self.g.op("Cast", [total], f"{total.name}.narrow", to=self.compute), total

    def product(self, x: ir.Value, linear: Linear, weight: Weight, out: str) -> ir.Value:
        return self._linear(x, linear, weight, out)

    def silu(self, x: ir.Value, out: str) -> ir.Value:
        return self.g.op("Mul", [x, self.g.op("Sigmoid", [x], f"{out}.sigmoid")], out)

    def attend(self, qkv: ir.Value, block: Block) -> ir.Value:
        g, a, name = self.g, block.attention, f"layers.{block.layer}"
        sizes = g.shape_constant(a.q_size, a.kv_size, a.kv_size)
        parts = g.ops("Split", [qkv, sizes], [f"{name}.{part}" for part in "qkv"], axis=-1)
        norms, none = (a.q_norm, a.k_norm), (None, None)
        first, last = (none, norms) if a.norms_rotated else (norms, none)
        query = self._heads(parts[0], a.num_heads, a.head_dim, first[0])
        key = self._heads(parts[1], a.num_kv_heads, a.head_dim, first[1])
        value = self._heads(parts[2], a.num_kv_heads, a.head_dim, None)
        if a.rotary is not None:
            query = self._dialect.rotate(query, a.rotary, f"{name}.q.rotated")
            key = self._dialect.rotate(key, a.rotary, f"{name}.k.rotated")
        query, key = (x if norm is None else self.norm(x, norm) for x, norm in zip((query, key), last, strict=True))
        out, present_key, present_value = self._dialect.attend(
            [query, key, value], self._past[block.layer], block, self.sinks(a, ir.DataType.FLOAT)
        )
        self.present += [present_key, present_value]
        rows = g.op("Transpose", [out], f"{name}.attended.rows", perm=[0, 2, 1, 3])
        return g.op("Reshape", [rows, g.shape_constant(0, 0, a.q_size)], f"{name}.attended")

    def mix(self, x: ir.Value, experts: Experts, run: Callable[[ir.Value, Mlp], ir.Value]) -> ir.Value:
        """Every expert computes all tokens: see graph/experts.py."""
        return mix_densely(self.g, x, experts, self.routes(x, experts), run, self.compute)

    def convolved(self, x: ir.Value, conv: Convolution, layer: int) -> ir.Value:
        return self._states.convolve(x, conv, layer)

    def delta_rule(self, inputs: DeltaInputs, mixer: GatedDelta, layer: int) -> ir.Value:
        return self.marked_float(scan_delta_rule(self.g, self._states, inputs, mixer.heads, layer))

    def decayed_sum(self, inputs: SumInputs, heads: RecurrentHeads, layer: int) -> ir.Value:
        return scan_sum(self.g, self._states, inputs, heads, layer)

    def heads(self, x: ir.Value, num_heads: int, out: str) -> ir.Value:
        return self.g.op("Reshape", [x, self.g.shape_constant(0, 0, num_heads, -1)], out)

    def flat(self, x: ir.Value, size: int, out: str) -> ir.Value:
        return self.g.op("Reshape", [x, self.g.shape_constant(0, 0, size)], out)

    @property
    def stream_type(self) -> ir.DataType:
        return ir.DataType.FLOAT

    def _heads(self, x: ir.Value, num_heads: int, head_dim: int, norm: Norm | None) -> ir.Value:
        """`[B, S, heads * head_dim]` to `[B, heads, S, head_dim]`, with `norm` over each head or over all of them."""
        g, is_whole = self.g, norm is not None and norm.size != head_dim
        if norm is not None and is_whole:
            x = self.norm(x, norm)
        heads = g.op("Reshape", [x, g.shape_constant(0, 0, num_heads, head_dim)], f"{x.name}.heads")
        if norm is not None and not is_whole:
            heads = self.norm(heads, norm)
        return g.op("Transpose", [heads], f"{x.name}.4d", perm=[0, 2, 1, 3])

    def as_stream(self, x: ir.Value) -> ir.Value:
        """Cast a value to float32; a value that is already float32 is returned unchanged."""
        if self.compute == ir.DataType.FLOAT or x.name in self._wide:
            return x
        return self.marked_float(self.g.op("Cast", [x], f"{x.name}.float32", to=ir.DataType.FLOAT))

    def marked_float(self, x: ir.Value) -> ir.Value:
        """Remember that the value is float32."""
        self._wide.add(x.name)
        return x
