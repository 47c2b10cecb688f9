"""Mixtures of experts in standard ONNX: routing, and the experts' weighted sum in two forms.

    mix_by_expert   rows are sorted by expert and cut, so that each expert multiplies its own rows and no others
    mix_densely     every expert multiplies all rows, for TensorRT: it has no shapes that depend on values in the middle
                    of a graph (NonZero, a Split by counts)

ONNX Runtime's own QMoE is slower with 4 bits (1, 4, 16, 64 and 512 rows of one layer of 8 experts, 1024 x 2816: 1.5,
8.5, 25, 45 and 224 ms; sorted rows 0.25, 4, 7 to 15, 15 and 117 ms) and as fast with 8, and wants gate and up
interleaved.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.builder import GraphBuilder
from export.model.description import Experts, Mlp
from export.model.routing import Routing, Scores

_LOWEST = float(np.finfo(np.float32).min)


class Routes(NamedTuple):
    """The experts of each token, int64, and the weights of their outputs, float32: `[..., top_k]` both."""

    chosen: ir.Value
    weights: ir.Value


def route(g: GraphBuilder, logits: ir.Value, experts: Experts, bias: NDArray[np.float32] | None) -> Routes:
    """Choose experts by a router's float32 logits `[..., experts]`; bias `[experts]`: see `Experts.choice_bias`."""
    routing, name = experts.routing, f"{experts.router.site}"
    if routing.scores is Scores.SPARSEMIXER:
        return _one_by_one(g, logits, routing, name)
    if routing.scores is Scores.SOFTMAX:
        scores = g.op("Softmax", [logits], f"{name}.scores", axis=-1)
    else:
        scores = g.op("Sigmoid", [logits], f"{name}.scores")
    ranked = scores
    if bias is not None:
        ranked = g.op("Add", [scores, g.array(f"{experts.choice_bias}", bias)], f"{name}.ranked")
    if routing.num_groups > 1:
        ranked = _only_best_groups(g, ranked, experts, has_bias=bias is not None)
    count = g.shape_constant(routing.top_k)
    best, chosen = g.ops("TopK", [ranked, count], [f"{name}.best", f"{name}.chosen"], axis=-1)
    weights = best if ranked is scores else g.op("GatherElements", [scores, chosen], f"{name}.weights", axis=-1)
    if routing.is_normalized:
        total = g.op("ReduceSum", [weights, g.shape_constant(-1)], f"{name}.sum", keepdims=1)
        if routing.epsilon:
            total = g.op("Add", [total, _float(g, routing.epsilon)], f"{name}.sum.epsilon")
        if routing.least_sum:
            total = g.op("Max", [total, _float(g, routing.least_sum)], f"{name}.sum.least")
        weights = g.op("Div", [weights, total], f"{name}.shares")
    if routing.scale != 1:
        weights = g.op("Mul", [weights, _float(g, routing.scale)], f"{name}.scaled")
    return Routes(chosen, weights)


def _only_best_groups(g: GraphBuilder, ranked: ir.Value, experts: Experts, *, has_bias: bool) -> ir.Value:
    """Scores, with a very low one for the experts of groups that are not among the best."""
    routing, name = experts.routing, f"{experts.router.site}.groups"
    size = len(experts.experts) // routing.num_groups
    grouped = g.op("Reshape", [ranked, g.shape_constant(-1, routing.num_groups, size)], f"{name}.scores")
    num_best = g.shape_constant(min(2, size) if has_bias else 1)
    best, _ = g.ops("TopK", [grouped, num_best], [f"{name}.best", f"{name}.best.idx"], axis=-1)
    of_groups = g.op("ReduceSum", [best, g.shape_constant(-1)], f"{name}.sum", keepdims=0)
    count = g.shape_constant(routing.top_groups)
    _, groups = g.ops("TopK", [of_groups, count], [f"{name}.kept.sum", f"{name}.kept"], axis=-1)
    hits = g.op("Cast", [_one_hot(g, groups, routing.num_groups, name)], f"{name}.hits.float", to=ir.DataType.FLOAT)
    is_kept = g.op("Cast", [g.op("ReduceSum", [hits, g.shape_constant(-2)], f"{name}.mask", keepdims=0)],
                   f"{name}.mask.bool", to=ir.DataType.BOOL)  # fmt: skip
    kept = g.op("Unsqueeze", [is_kept, g.shape_constant(-1)], f"{name}.mask.3d")
    allowed = g.op("Where", [kept, grouped, _float(g, _LOWEST)], f"{name}.allowed")
    return g.op("Reshape", [allowed, g.op("Shape", [ranked], f"{name}.shape")], f"{name}.ranked")


def _one_by_one(g: GraphBuilder, logits: ir.Value, routing: Routing, name: str) -> Routes:
    """SparseMixer: see `Routing.jitter`."""
    one, lowest = g.shape_constant(1), _float(g, _LOWEST)
    size, left = g.op("Abs", [logits], f"{name}.size"), logits
    every_chosen, every_weight = [], []
    for rank in range(routing.top_k):
        out = f"{name}.{rank}"
        highest, chosen = g.ops("TopK", [left, one], [f"{out}.best", f"{out}.chosen"], axis=-1)
        gap = g.op("Sub", [highest, logits], f"{out}.gap")
        limit = g.op("Max", [size, highest], f"{out}.limit")
        is_far = g.op(
            "Greater", [g.op("Div", [gap, limit], f"{out}.distance"), _float(g, 2 * routing.jitter)], f"{out}.far"
        )
        near = g.op("Softmax", [g.op("Where", [is_far, lowest, left], f"{out}.near")], f"{out}.scores", axis=-1)
        every_chosen.append(chosen)
        every_weight.append(g.op("GatherElements", [near, chosen], f"{out}.weight", axis=-1))
        if rank + 1 < routing.top_k:
            left = g.op(
                "ScatterElements",
                [left, chosen, g.op("Min", [highest, lowest], f"{out}.lowest")],
                f"{out}.left",
                axis=-1,
            )
    return Routes(
        g.op("Concat", every_chosen, f"{name}.chosen", axis=-1),
        g.op("Concat", every_weight, f"{name}.weights", axis=-1),
    )


def mix_by_expert(
    g: GraphBuilder,
    x: ir.Value,
    experts: Experts,
    routes: Routes,
    run: Callable[[ir.Value, Mlp], ir.Value],
    compute: ir.DataType,
) -> ir.Value:
    """The weighted sum of each token's experts, x `[tokens, hidden]`; an expert without tokens gets no rows."""
    name, top_k = f"{experts.router.site}", experts.routing.top_k
    flat = g.op("Reshape", [routes.chosen, g.shape_constant(-1)], f"{name}.flat")
    count = g.op("Shape", [flat], f"{name}.count")
    # TopK orders equal values by their place, so that an expert's rows keep the order of the tokens.
    _, order = g.ops("TopK", [flat, count], [f"{name}.sorted", f"{name}.order"], largest=0)
    _, back = g.ops("TopK", [order, count], [f"{name}.places", f"{name}.back"], largest=0)
    hits = g.op("Cast", [_one_hot(g, flat, len(experts.experts), name)], f"{name}.hits.long", to=ir.DataType.INT64)
    counts = g.op("ReduceSum", [hits, g.shape_constant(0)], f"{name}.counts", keepdims=0)
    tokens = g.op("Div", [order, g.constant(f"top_k.{top_k}", np.array(top_k, np.int64))], f"{name}.tokens")
    rows = g.op("Gather", [x, tokens], f"{name}.rows", axis=0)
    names = [f"{expert.up.site}.rows" for expert in experts.experts]
    parts = g.ops("Split", [rows, counts], names, axis=0)
    outputs = [run(part, expert) for part, expert in zip(parts, experts.experts, strict=True)]
    sorted_out = g.op("Concat", outputs, f"{name}.outputs.sorted", axis=0)
    out = g.op("Gather", [sorted_out, back], f"{name}.outputs.flat", axis=0)
    if compute != ir.DataType.FLOAT:
        out = g.op("Cast", [out], f"{name}.outputs.float32", to=ir.DataType.FLOAT)
    out = g.op("Reshape", [out, g.shape_constant(-1, top_k, experts.router.num_inputs)], f"{name}.outputs")
    weights = g.op("Unsqueeze", [routes.weights, g.shape_constant(-1)], f"{name}.weights.3d")
    weighed = g.op("Mul", [out, weights], f"{name}.weighed")
    mixed = g.op("ReduceSum", [weighed, g.shape_constant(1)], f"{name}.mixed", keepdims=0)
    return mixed if compute == ir.DataType.FLOAT else g.op("Cast", [mixed], f"{name}.mixed.half", to=compute)


def mix_densely(
    g: GraphBuilder,
    x: ir.Value,
    experts: Experts,
    routes: Routes,
    run: Callable[[ir.Value, Mlp], ir.Value],
    compute: ir.DataType,
) -> ir.Value:
    """The same sum with every expert computed for all tokens: one that was not chosen has the weight 0.

    x `[..., hidden]`; sums are float32.
    """
    name, num_experts = f"{experts.router.site}", len(experts.experts)
    hits = _one_hot(g, routes.chosen, num_experts, name)
    ones = g.op("Cast", [hits], f"{name}.hits.float", to=ir.DataType.FLOAT)
    spread = g.op("Mul", [ones, g.op("Unsqueeze", [routes.weights, g.shape_constant(-1)], f"{name}.weights.3d")],
                  f"{name}.spread")  # fmt: skip
    weights = g.op("ReduceSum", [spread, g.shape_constant(-2)], f"{name}.dense", keepdims=0)
    names = [f"{expert.down.site}.weight" for expert in experts.experts]
    columns = g.ops("Split", [weights], names, axis=-1, num_outputs=num_experts)
    total: ir.Value | None = None
    for expert, column in zip(experts.experts, columns, strict=True):
        out, y = f"{expert.down.site}", run(x, expert)
        if compute != ir.DataType.FLOAT:
            y = g.op("Cast", [y], f"{out}.float32", to=ir.DataType.FLOAT)
        y = g.op("Mul", [y, column], f"{out}.weighed")
        total = y if total is None else g.op("Add", [total, y], f"{out}.total")
    assert total is not None
    return total if compute == ir.DataType.FLOAT else g.op("Cast", [total], f"{name}.mixed.half", to=compute)


def _one_hot(g: GraphBuilder, chosen: ir.Value, size: int, name: str) -> ir.Value:
    """Bool `[..., size]`, true where a number of int64 `[...]` is the place."""
    numbers = g.constant(f"numbers.{size}", np.arange(size, dtype=np.int64))
    return g.op("Equal", [g.op("Unsqueeze", [chosen, g.shape_constant(-1)], f"{name}.column"), numbers], f"{name}.hits")


def _float(g: GraphBuilder, value: float) -> ir.Value:
    return g.constant(f"float.{value!r}", np.array(value, np.float32))
