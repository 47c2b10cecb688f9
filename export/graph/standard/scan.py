"""Linear recurrences in standard ONNX: a Scan over the tokens, in float32."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.recurrence import DeltaInputs, SumInputs
from export.graph.states import RowStates
from export.model.description import RecurrentHeads

_UNIT_EPSILON = 1e-6
"""Added to the squared length of q and k, as in transformers."""


def scan_delta_rule(
    g: GraphBuilder, states: RowStates, inputs: DeltaInputs, heads: RecurrentHeads, layer: int
) -> ir.Value:
    """S q of every token and head, float32 `[B, S, v_heads, v_dim]`; writes the rows' states.

    Padding decays nothing and adds nothing.
    """
    name = f"layers.{layer}.delta"
    q, k = (_unit(g, x, f"{name}.{part}") for part, x in (("q", inputs.q), ("k", inputs.k)))
    scale = g.constant(f"delta.scale.{heads.k_dim}", np.array(heads.k_dim**-0.5, np.float32))
    scaled = g.op("Mul", [q, scale], f"{name}.q.scaled")
    v = g.op("Cast", [inputs.v], f"{name}.v.float32", to=ir.DataType.FLOAT)
    return _scan(g, states, [scaled, k, v, *_gates(g, states, inputs, name)], heads, layer, name)


def scan_sum(g: GraphBuilder, states: RowStates, inputs: SumInputs, heads: RecurrentHeads, layer: int) -> ir.Value:
    """The same of a sum that decays."""
    name = f"layers.{layer}.sum"
    q, k, v = (
        g.op("Cast", [x], f"{name}.{part}.float32", to=ir.DataType.FLOAT)
        for part, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
    )
    is_token = _is_token(g, states, inputs.decay, name)
    zero = g.constant("zero.float32", np.array(0, np.float32))
    kept = g.op("Exp", [g.op("Where", [is_token, inputs.decay, zero], f"{name}.decay.masked")], f"{name}.kept")
    added = g.op("Where", [g.op("Unsqueeze", [is_token, g.shape_constant(-1)], f"{name}.is_token.4d"), v, zero],
                 f"{name}.v.masked")  # fmt: skip
    return _scan(g, states, [q, k, added, kept], heads, layer, name)


def _scan(
    g: GraphBuilder, states: RowStates, inputs: Sequence[ir.Value], heads: RecurrentHeads, layer: int, name: str
) -> ir.Value:
    """inputs: q, k and v `[B, S, heads, dim]`, exp(decay) `[B, S, v_heads]`, and beta of a delta rule."""
    group = heads.num_v_heads // heads.num_k_heads
    of_keys = g.shape_constant(0, 0, heads.num_k_heads, 1, 1, heads.k_dim)
    of_values = g.shape_constant(0, 0, heads.num_k_heads, group, -1, 1)
    timed = []
    for idx, x in enumerate(inputs):
        shaped = g.op("Reshape", [x, of_keys if idx < 2 else of_values], f"{x.name}.6d")
        timed.append(g.op("Transpose", [shaped], f"{x.name}.by_token", perm=[1, 0, 2, 3, 4, 5]))
    grouped = g.shape_constant(0, heads.num_k_heads, group, heads.v_dim, heads.k_dim)
    first = g.op("Reshape", [states.read(layer, heads.state), grouped], f"{name}.first")
    last, out = g.ops(
        "Scan",
        [first, *timed],
        [f"{name}.last", f"{name}.by_token"],
        num_scan_inputs=len(timed),
        body=_body(g, name, has_beta=len(timed) > 4),
    )
    shape = g.shape_constant(0, *heads.state.shape)
    states.write(layer, heads.state, g.op("Reshape", [last, shape], f"present.{layer}.{heads.state.kind}"))
    rows = g.op("Transpose", [out], f"{name}.rows", perm=[1, 0, 2, 3, 4, 5])
    return g.op("Reshape", [rows, g.shape_constant(0, 0, heads.num_v_heads, heads.v_dim)], name)


def _unit(g: GraphBuilder, x: ir.Value, out: str) -> ir.Value:
    """x over the length of its last axis, float32."""
    wide = g.op("Cast", [x], f"{out}.float32", to=ir.DataType.FLOAT)
    square = g.op("ReduceSum", [g.op("Mul", [wide, wide], f"{out}.square"), g.shape_constant(-1)], f"{out}.sum",
                  keepdims=1)  # fmt: skip
    epsilon = g.constant("delta.epsilon", np.array(_UNIT_EPSILON, np.float32))
    length = g.op("Sqrt", [g.op("Add", [square, epsilon], f"{out}.sum.epsilon")], f"{out}.length")
    return g.op("Div", [wide, length], f"{out}.unit")


def _gates(g: GraphBuilder, states: RowStates, inputs: DeltaInputs, name: str) -> tuple[ir.Value, ir.Value]:
    """exp(decay) and beta of every token and head, float32 `[B, S, v_heads]`; 1 and 0 of padding."""
    a, b = (g.op("Cast", [x], f"{name}.{part}.float32", to=ir.DataType.FLOAT) for part, x in
            (("a", inputs.a), ("b", inputs.b)))  # fmt: skip
    soft = g.op("Softplus", [g.op("Add", [a, inputs.dt_bias], f"{name}.a.biased")], f"{name}.softplus")
    rate = g.op("Neg", [g.op("Exp", [inputs.a_log], f"{name}.rate.positive")], f"{name}.rate")
    decay = g.op("Mul", [soft, rate], f"{name}.decay")
    is_token = _is_token(g, states, inputs.a, name)
    zero = g.constant("zero.float32", np.array(0, np.float32))
    kept = g.op("Exp", [g.op("Where", [is_token, decay, zero], f"{name}.decay.masked")], f"{name}.kept")
    return kept, g.op("Where", [is_token, g.op("Sigmoid", [b], f"{name}.beta.all"), zero], f"{name}.beta")


def _is_token(g: GraphBuilder, states: RowStates, x: ir.Value, name: str) -> ir.Value:
    """bool [B, S, 1]: false for padding. x: any `[B, S, channels]`."""
    zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
    size = g.op("Squeeze", [g.op("Shape", [x], f"{name}.shape", start=1, end=2)], f"{name}.size")
    steps = g.op("Unsqueeze", [g.op("Range", [zero, size, one], f"{name}.steps.1d"), g.shape_constant(1)],
                 f"{name}.steps")  # fmt: skip
    length = g.op("Unsqueeze", [states.lengths[1], g.shape_constant(1, 2)], f"{name}.length")
    return g.op("Less", [steps, length], f"{name}.is_token")


def _body(g: GraphBuilder, name: str, *, has_beta: bool) -> ir.Graph:
    """One token: from the state, q, k, v, exp(decay) and beta to the next state and S q, `[B, k_heads, group, ...]`."""
    labels = ("state", "q", "k", "v", "kept", *(("beta",) if has_beta else ()))

    def build(values: Sequence[ir.Value]) -> list[tuple[ir.Value, ir.DataType]]:
        state, q, k, v, kept, *beta = values
        last = g.shape_constant(-1)
        faded = g.op("Mul", [state, kept], f"{name}.step.faded")
        if beta:
            keyed = g.op("Mul", [faded, k], f"{name}.step.keyed")
            known = g.op("ReduceSum", [keyed, last], f"{name}.step.known", keepdims=1)
            v = g.op("Mul", [g.op("Sub", [v, known], f"{name}.step.new"), beta[0]], f"{name}.step.delta")
        present = g.op("Add", [faded, g.op("Mul", [v, k], f"{name}.step.added")], f"{name}.step.present")
        asked = g.op("Mul", [present, q], f"{name}.step.asked")
        out = g.op("ReduceSum", [asked, last], f"{name}.step.out", keepdims=1)
        return [(present, ir.DataType.FLOAT), (out, ir.DataType.FLOAT)]

    return g.body(f"{name}.step", [(f"{name}.step.{label}", ir.DataType.FLOAT) for label in labels], build)
