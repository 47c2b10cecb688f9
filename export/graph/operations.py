"""The walker's operations that all ONNX graphs share: linear layers, MLPs, mixtures of experts, logits."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.experts import Routes, mix_by_expert, route
from export.graph.recurrence import RecurrentOperations
from export.graph.weights import GraphWeights, Weight
from export.model.description import Activation, Attention, Clamp, Embedding, Experts, Head, Linear, Mlp, Norm
from export.model.walker import Stream


class CachedValues(NamedTuple):
    """The output of attention, and the KV cache with the new tokens written to it."""

    out: ir.Value
    key: ir.Value
    value: ir.Value


class GraphOperations(RecurrentOperations):
    """Operations that need no dialect's own operators. A value is `[tokens, channels]` or `[B, S, channels]`.

    compute: type of every value except those that a dialect keeps in float32
    num_outer: dimensions of a value before the channels
    """

    num_outer = 1

    def __init__(self, g: GraphBuilder, weights: GraphWeights, compute: ir.DataType) -> None:
        self.g, self.weights, self.compute = g, weights, compute

    @abstractmethod
    def product(self, x: ir.Value, linear: Linear, weight: Weight, out: str) -> ir.Value:
        """x `[..., K]` times the transposed weight `[N, K]`, in the form that the scheme chooses."""

    @abstractmethod
    def norm(self, x: ir.Value, norm: Norm) -> ir.Value: ...

    @abstractmethod
    def silu(self, x: ir.Value, out: str) -> ir.Value:
        """x * sigmoid(x)."""

    def sum(self, stream: Stream[ir.Value]) -> tuple[ir.Value, ir.Value]:
        total = stream.value if stream.addend is None else self.add(stream.addend, stream.value)
        return total, total

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.g.op("Add", [x, y], f"{x.name}.plus")

    def scale(self, x: ir.Value, factor: float) -> ir.Value:
        value = self.g.constant(f"scale.{factor!r}", np.array(factor, self.compute.numpy()))
        return self.g.op("Mul", [x, value], f"{x.name}.scaled")

    def clip(self, x: ir.Value, limit: float) -> ir.Value:
        bounds = (np.array(bound, self.compute.numpy()) for bound in (-limit, limit))
        limits = [self.g.constant(f"limit.{float(bound)!r}", bound) for bound in bounds]
        return self.g.op("Clip", [x, *limits], f"{x.name}.clipped")

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        weight, out = self.weights.matrix(linear), f"{linear.site}"
        y = self.product(x, linear, weight, f"{out}.product" if linear.has_bias else out)
        if not linear.has_bias:
            return y
        bias = self.weights.bias(linear).astype(self.compute.numpy(), copy=False)
        return self.g.op("Add", [y, self.g.array(f"{weight.name}.bias", bias)], out)

    def activate(self, up: ir.Value, mlp: Mlp) -> ir.Value:
        g, name = self.g, f"{mlp.down.site}"
        if not mlp.is_gated:
            return self._activated(up, mlp.activation, f"{name}.activated")
        sizes = g.shape_constant(mlp.down.num_inputs, mlp.down.num_inputs)
        gate, up = g.ops("Split", [up, sizes], [f"{name}.gate", f"{name}.up"], axis=-1)
        if mlp.clamp is not None:
            return self._clamped(gate, up, mlp.clamp, name)
        return g.op("Mul", [self._activated(gate, mlp.activation, f"{name}.activated"), up], f"{name}.gated")

    def _activated(self, x: ir.Value, activation: Activation, out: str) -> ir.Value:
        if activation is Activation.SILU:
            return self.silu(x, out)
        if activation in (Activation.GELU, Activation.GELU_TANH):
            return self.g.op("Gelu", [x], out, approximate="tanh" if activation is Activation.GELU_TANH else "none")
        if activation is Activation.RELU:
            return self.g.op("Relu", [x], out)
        positive = self.g.op("Relu", [x], f"{out}.relu")
        return self.g.op("Mul", [positive, positive], out)

    def _clamped(self, gate: ir.Value, up: ir.Value, clamp: Clamp, name: str) -> ir.Value:
        """See `Clamp`."""
        g = self.g

        def number(value: float) -> ir.Value:
            return g.constant(f"clamp.{value!r}", np.array(value, self.compute.numpy()))

        low = g.op("Min", [gate, number(clamp.limit)], f"{name}.gate.clamped")
        share = g.op("Sigmoid", [g.op("Mul", [low, number(clamp.alpha)], f"{name}.alpha")], f"{name}.share")
        active = g.op("Mul", [low, share], f"{name}.activated")
        inside = g.op("Clip", [up, number(-clamp.limit), number(clamp.limit)], f"{name}.up.clamped")
        return g.op("Mul", [g.op("Add", [inside, number(1.0)], f"{name}.up.plus"), active], f"{name}.gated")

    def sinks(self, attention: Attention, dtype: ir.DataType) -> ir.Value | None:
        """Scores of the attention sinks `[num_heads]`; None if there are none."""
        if attention.sinks is None:
            return None
        return self.g.array(attention.sinks, self.weights.vector(attention.sinks).astype(dtype.numpy()))

    def split(self, x: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
        names = [f"{x.name}.part.{idx}" for idx in range(len(sizes))]
        return self.g.ops("Split", [x, self.g.shape_constant(*sizes)], names, axis=-1)

    def unfold(self, q: ir.Value, kv: ir.Value, rotating: ir.Value, attention: Attention) -> ir.Value:
        g, a, latent = self.g, attention, attention.latent
        assert latent is not None
        name, outer = f"layers.{a.qkv.site.layer}.latent", (0,) * self.num_outer
        rotating_dim, zeros = a.head_dim - latent.still_dim, a.head_dim - latent.value_dim

        def heads(x: ir.Value, num_heads: int, dim: int, out: str) -> ir.Value:
            return g.op("Reshape", [x, g.shape_constant(*outer, num_heads, dim)], f"{name}.{out}")

        q_sizes, kv_sizes = (latent.still_dim, rotating_dim), (latent.still_dim, latent.value_dim)
        q_still, q_turning = self.split(heads(q, a.num_heads, a.head_dim, "q"), q_sizes)
        k_still, v = self.split(heads(kv, a.num_heads, sum(kv_sizes), "kv"), kv_sizes)
        every = g.shape_constant(a.num_heads, 1)  # broadcast against [..., 1, rotating_dim]
        k_turning = g.op("Expand", [heads(rotating, 1, rotating_dim, "shared"), every], f"{name}.k.turning")
        pads = g.constant(f"pads.{zeros}", np.array([0, zeros], np.int64))
        padded = g.op("Pad", [v, pads, None, g.shape_constant(-1)], f"{name}.v.padded")
        parts = [
            g.op("Concat", [q_turning, q_still], f"{name}.q.heads", axis=-1),
            g.op("Concat", [k_turning, k_still], f"{name}.k.heads", axis=-1),
            padded,
        ]
        flat = [g.op("Reshape", [x, g.shape_constant(*outer, a.q_size)], f"{x.name}.flat") for x in parts]
        return g.op("Concat", flat, f"{name}.qkv", axis=-1)

    def without_padding(self, attended: ir.Value, attention: Attention) -> ir.Value:
        g, a, name = self.g, attention, f"{attended.name}.values"
        assert a.latent is not None
        outer, dim = (0,) * self.num_outer, a.latent.value_dim
        heads = g.op("Reshape", [attended, g.shape_constant(*outer, a.num_heads, a.head_dim)], f"{name}.heads")
        values, _ = self.split(heads, (dim, a.head_dim - dim))
        return g.op("Reshape", [values, g.shape_constant(*outer, a.num_heads * dim)], name)

    def mix(self, x: ir.Value, experts: Experts, run: Callable[[ir.Value, Mlp], ir.Value]) -> ir.Value:
        """Each expert computes only the tokens that chose it."""
        return mix_by_expert(self.g, x, experts, self.routes(x, experts), run, self.compute)

    def routes(self, x: ir.Value, experts: Experts) -> Routes:
        """Which experts the tokens of x choose."""
        logits = self.linear(x, experts.router)
        if self.compute != ir.DataType.FLOAT:
            logits = self.g.op("Cast", [logits], f"{experts.router.site}.float32", to=ir.DataType.FLOAT)
        bias = None if experts.choice_bias is None else self.weights.vector(experts.choice_bias)
        return route(self.g, logits, experts, bias)

    def gate(self, x: ir.Value, logits: ir.Value) -> ir.Value:
        return self.g.op("Mul", [x, self.g.op("Sigmoid", [logits], f"{logits.name}.sigmoid")], f"{x.name}.weighed")

    def placed(self, x: ir.Value, positions: ir.Value, embedding: Embedding, num_rows: int) -> ir.Value:
        """Scale embeddings, add learned positions, norm. num_rows: rows of their table that a graph can read."""
        if embedding.scale is not None:
            scale = np.array(embedding.scale, self.stream_type.numpy())
            x = self.g.op("Mul", [x, self.g.constant("embed.scale", scale)], "embed.scaled")
        if embedding.positions is not None:
            x = self._with_positions(x, positions, embedding, num_rows)
        return x if embedding.norm is None else self.as_stream(self.norm(x, embedding.norm))

    def _with_positions(self, x: ir.Value, positions: ir.Value, embedding: Embedding, num_rows: int) -> ir.Value:
        table, first = self.weights.table(str(embedding.positions)), embedding.position_offset
        rows = table[first : first + num_rows].astype(self.compute.numpy())
        # After a full slot, padding has the position after the last one.
        padded = np.concatenate([rows, np.zeros_like(rows[:1])]) if len(rows) < num_rows else rows
        stored = self.g.array(f"{embedding.positions}.weight", padded)
        row = self.g.op("Gather", [stored, positions], "embed.positions", axis=0)
        return self.add(x, self.as_stream(row))

    @property
    def stream_type(self) -> ir.DataType:
        """The type of the residual stream."""
        return self.compute

    def as_stream(self, x: ir.Value) -> ir.Value:
        """Cast to the type of the residual stream."""
        return x

    def finished(self, logits: ir.Value, head: Head) -> ir.Value:
        """Scale and cap logits; returns float32 `[R, vocab]`."""
        g = self.g
        # ONNX Runtime copies a Cast that changes nothing: 0.7 ms of 32 rows of 49,152 logits.
        is_wide = self.compute == ir.DataType.FLOAT
        wide = logits if is_wide else g.op("Cast", [logits], "logits.wide", to=ir.DataType.FLOAT)
        if head.scale is head.softcap is None:
            wide.name = "logits"
        if head.scale is not None:
            scale = g.constant("logits.scale", np.array(head.scale, np.float32))
            wide = g.op("Mul", [wide, scale], "logits" if head.softcap is None else "logits.scaled")
        return wide if head.softcap is None else capped(g, wide, head.softcap, "logits")


def capped(g: GraphBuilder, x: ir.Value, cap: float, out: str) -> ir.Value:
    """cap * tanh(x / cap), float32."""
    limit = g.constant(f"cap.{cap:g}", np.array(cap, np.float32))
    return g.op("Mul", [g.op("Tanh", [g.op("Div", [x, limit], f"{out}.part")], f"{out}.tanh"), limit], out)
