"""The walker's operations that all ONNX graphs share: linear layers, MLPs, mixtures of experts, logits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.weights import GraphWeights, Weight
from export.model.description import Activation, Embedding, Experts, Head, Linear, Mlp


class CachedValues(NamedTuple):
    """The output of attention, and the KV cache with the new tokens written to it."""

    out: ir.Value
    key: ir.Value
    value: ir.Value


class GraphOperations(ABC):
    """Operations that need no dialect's own operators. A value is `[tokens, channels]` or `[B, S, channels]`.

    compute: type of every value except those that a dialect keeps in float32
    """

    def __init__(self, g: GraphBuilder, weights: GraphWeights, compute: ir.DataType) -> None:
        self.g, self.weights, self.compute = g, weights, compute

    @abstractmethod
    def product(self, x: ir.Value, linear: Linear, weight: Weight, out: str) -> ir.Value:
        """x `[..., K]` times the transposed weight `[N, K]`, in the form that the scheme chooses."""

    @abstractmethod
    def silu(self, x: ir.Value, out: str) -> ir.Value:
        """x * sigmoid(x)."""

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.g.op("Add", [x, y], f"{x.name}.plus")

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
        return g.op("Mul", [self._activated(gate, mlp.activation, f"{name}.activated"), up], f"{name}.gated")

    def _activated(self, x: ir.Value, activation: Activation, out: str) -> ir.Value:
        if activation is Activation.SILU:
            return self.silu(x, out)
        return self.g.op("Gelu", [x], out, approximate="tanh")

    def mix(self, x: ir.Value, experts: Experts, run: Callable[[ir.Value, Mlp], ir.Value]) -> ir.Value:
        """Each expert computes only the tokens that chose it.

        Sums are float32, because on the CPU ScatterND does not add in half precision.
        """
        g, name = self.g, f"{experts.router.site}"
        hidden = experts.router.num_inputs
        flat = g.op("Reshape", [x, g.shape_constant(-1, hidden)], f"{name}.tokens")
        logits = g.op("Cast", [self.linear(flat, experts.router)], f"{name}.logits", to=ir.DataType.FLOAT)
        count = g.shape_constant(experts.top_k)
        best, chosen = g.ops("TopK", [logits, count], [f"{name}.best", f"{name}.chosen"], axis=-1)
        shares = g.op("Softmax", [best], f"{name}.shares", axis=-1)
        nothing = ir.tensor(np.zeros(1, np.float32))
        total = g.op("ConstantOfShape", [g.op("Shape", [flat], f"{name}.shape")], f"{name}.nothing", value=nothing)
        for idx, expert in enumerate(experts.experts):
            total = self._with_expert(total, flat, chosen, shares, idx, expert, run)
        mixed = g.op("Cast", [total], f"{name}.mixed.tokens", to=self.compute)
        return g.op("Reshape", [mixed, g.op("Shape", [x], f"{name}.outer")], f"{name}.mixed")

    def _with_expert(
        self,
        total: ir.Value,
        tokens: ir.Value,
        chosen: ir.Value,
        shares: ir.Value,
        idx: int,
        expert: Mlp,
        run: Callable[[ir.Value, Mlp], ir.Value],
    ) -> ir.Value:
        """Add one expert's weighted output to `total`. chosen int64 and shares `[tokens, top_k]`."""
        g, name = self.g, f"{expert.down.site}"
        number = g.constant(f"expert.{idx}", np.array(idx, np.int64))
        places = g.op("NonZero", [g.op("Equal", [chosen, number], f"{name}.hits")], f"{name}.places.2d")
        places = g.op("Transpose", [places], f"{name}.places", perm=[1, 0])  # [hits, 2]: token and rank
        rows = g.op("Gather", [places, g.constant("zero", np.array(0, np.int64))], f"{name}.rows", axis=1)
        y = run(g.op("Gather", [tokens, rows], f"{name}.tokens", axis=0), expert)
        wide = g.op("Cast", [y], f"{name}.float32", to=ir.DataType.FLOAT)
        share = g.op("Unsqueeze", [g.op("GatherND", [shares, places], f"{name}.share.1d"), g.shape_constant(1)],
                     f"{name}.share")  # fmt: skip
        weighed = g.op("Mul", [wide, share], f"{name}.weighed")
        where = g.op("Unsqueeze", [rows, g.shape_constant(1)], f"{name}.rows.2d")
        return g.op("ScatterND", [total, where, weighed], f"{name}.total", reduction="add")

    def placed(self, x: ir.Value, positions: ir.Value, embedding: Embedding, num_rows: int) -> ir.Value:
        """Scale embeddings, and add learned positions. num_rows: rows of their table that a graph can read."""
        if embedding.scale is not None:
            scale = np.array(embedding.scale, self.stream_type.numpy())
            x = self.g.op("Mul", [x, self.g.constant("embed.scale", scale)], "embed.scaled")
        if embedding.positions is None:
            return x
        rows = self.weights.table(embedding.positions)[:num_rows].astype(self.compute.numpy())
        # After a full slot, padding has the position after the last one.
        padded = np.concatenate([rows, np.zeros_like(rows[:1])]) if len(rows) < num_rows else rows
        table = self.g.array(f"{embedding.positions}.weight", padded)
        row = self.g.op("Gather", [table, positions], "embed.positions", axis=0)
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
