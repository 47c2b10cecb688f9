"""States of recurrences as inputs and outputs of a graph, and a causal convolution over rows that carries its state on.

    past.L.KIND     float32 [B, ...]   what the tokens before a run have left in each row; zero is read at length 0
    present.L.KIND  the same memory    what the tokens of the run have added; an idle row's stays as it is

Padding behind a row's tokens never reaches its state: the state is read at the row's own length.
"""

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.weights import GraphWeights
from export.model.description import Convolution, ModelConfig, State

_END = np.iinfo(np.int64).max


class RowStates:
    """The states of one graph. Made before the graph's first node, because it declares inputs."""

    def __init__(self, g: GraphBuilder, config: ModelConfig, weights: GraphWeights, compute: ir.DataType) -> None:
        self._g, self._weights, self._compute = g, weights, compute
        self._past = {
            (block.layer, state): g.input(f"past.{block.layer}.{state.kind}", ir.DataType.FLOAT, ["B", *state.shape])
            for block in config.blocks
            for state in block.states
        }
        self._present: dict[tuple[int, State], ir.Value] = {}
        self._lengths: tuple[ir.Value, ir.Value] | None = None

    def begin(self, past_len: ir.Value, query_len: ir.Value) -> None:
        """Both int64 [B]: tokens of each row before this run and in it. Called once, before the blocks."""
        self._lengths = past_len, query_len

    @property
    def lengths(self) -> tuple[ir.Value, ir.Value]:
        """What `begin` got."""
        assert self._lengths is not None
        return self._lengths

    def past(self, layer: int, state: State) -> ir.Value:
        """The input, whatever an earlier request has left in it."""
        return self._past[layer, state]

    def read(self, layer: int, state: State) -> ir.Value:
        """The state before the run, zero in a row without tokens."""
        g, rank = self._g, len(state.shape)
        zero = g.constant("zero", np.array(0, np.int64))
        has_past = g.op("Greater", [self.lengths[0], zero], f"past.{layer}.{state.kind}.any")
        axes = g.shape_constant(*range(1, rank + 1))
        has_past = g.op("Unsqueeze", [has_past, axes], f"past.{layer}.{state.kind}.mask")
        nothing = g.constant("zero.float32", np.array(0, np.float32))
        return g.op("Where", [has_past, self._past[layer, state], nothing], f"past.{layer}.{state.kind}.read")

    def write(self, layer: int, state: State, present: ir.Value) -> None:
        """The state after the run; `present` is called `present.L.KIND`."""
        self._present[layer, state] = present

    def declare_outputs(self) -> None:
        """Declare what `write` got as outputs, in the order of the inputs."""
        for key in self._past:
            self._g.output(self._present[key], ir.DataType.FLOAT, ["B", *key[1].shape])

    def convolve(self, x: ir.Value, conv: Convolution, layer: int) -> ir.Value:
        """The convolution of rows x `[B, S, size]`, behind the tokens that their states remember."""
        g, name = self._g, f"layers.{layer}.conv"
        past = self.read(layer, conv.state)
        if self._compute != ir.DataType.FLOAT:
            past = g.op("Cast", [past], f"{name}.past", to=self._compute)
        whole = g.op("Concat", [past, x], f"{name}.whole", axis=1)
        taps = self._weights.tensor(f"{conv.name}.weight", (conv.size, 1, conv.width))
        total: ir.Value | None = None
        for tap in range(conv.width):
            stop = tap - conv.width + 1 or _END
            part = g.op("Slice", [whole, g.shape_constant(tap), g.shape_constant(stop), g.shape_constant(1)],
                        f"{name}.{tap}.inputs")  # fmt: skip
            weight = g.array(f"{conv.name}.weight.{tap}", np.ascontiguousarray(taps[:, 0, tap]))
            term = g.op("Mul", [part, weight], f"{name}.{tap}")
            total = term if total is None else g.op("Add", [total, term], f"{name}.{tap}.sum")
        assert total is not None
        self._keep(whole, conv.state, layer)
        if not conv.has_bias:
            return total
        bias = g.array(f"{conv.name}.bias", self._weights.tensor(f"{conv.name}.bias", (conv.size,)))
        return g.op("Add", [total, bias], f"{name}.biased")

    def _keep(self, whole: ir.Value, state: State, layer: int) -> None:
        """Of `[B, width - 1 + S, size]`, the inputs of each row's last tokens, which begin at the row's length."""
        g, name, count = self._g, f"present.{layer}.{state.kind}", state.shape[0]
        steps = g.constant(f"steps.{count}", np.arange(count, dtype=np.int64))
        first = g.op("Unsqueeze", [self.lengths[1], g.shape_constant(1)], f"{name}.first")
        places = g.op("Unsqueeze", [g.op("Add", [first, steps], f"{name}.places.2d"), g.shape_constant(2)],
                      f"{name}.places")  # fmt: skip
        is_float = self._compute == ir.DataType.FLOAT
        kept = g.op("GatherND", [whole, places], name if is_float else f"{name}.narrow", batch_dims=1)
        self.write(layer, state, kept if is_float else g.op("Cast", [kept], name, to=ir.DataType.FLOAT))
