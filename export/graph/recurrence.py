"""The walker's recurrences as ONNX: what all dialects share. Each has its own convolution over rows and its own sum.

A value is `[tokens, channels]` or `[B, S, channels]`; its leading dimensions are `...` below.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.weights import GraphWeights
from export.model.description import Convolution, GatedDelta, Mamba2, Norm, RecurrentHeads, ShortConv


class DeltaInputs(NamedTuple):
    """What a gated delta rule is computed from, before q and k have length 1 and the gates their functions.

    q, k `[..., k_heads, k_dim]`; v `[..., v_heads, v_dim]`; b, a `[..., v_heads]`; a_log, dt_bias float32 `[v_heads]`
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    b: ir.Value
    a: ir.Value
    a_log: ir.Value
    dt_bias: ir.Value


class SumInputs(NamedTuple):
    """What a sum that decays is computed from.

    q, k `[..., k_heads, k_dim]`; v `[..., v_heads, v_dim]`; decay float32 `[..., v_heads]`
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    decay: ir.Value


class RecurrentOperations(ABC):
    """Short convolutions and gated delta rules, made of what a dialect has for them."""

    g: GraphBuilder
    weights: GraphWeights
    compute: ir.DataType

    @abstractmethod
    def convolved(self, x: ir.Value, conv: Convolution, layer: int) -> ir.Value:
        """The convolution of x behind the tokens that the rows' states remember; the states get its last inputs."""

    @abstractmethod
    def delta_rule(self, inputs: DeltaInputs, mixer: GatedDelta, layer: int) -> ir.Value:
        """S q of every token and head, `[..., v_heads, v_dim]`; the rows' states get the last S."""

    @abstractmethod
    def decayed_sum(self, inputs: SumInputs, heads: RecurrentHeads, layer: int) -> ir.Value:
        """The same of S = exp(decay) * S + v k^T."""

    @abstractmethod
    def silu(self, x: ir.Value, out: str) -> ir.Value: ...

    @abstractmethod
    def norm(self, x: ir.Value, norm: Norm) -> ir.Value: ...

    @abstractmethod
    def heads(self, x: ir.Value, num_heads: int, out: str) -> ir.Value:
        """`[..., num_heads * dim]` to `[..., num_heads, dim]`."""

    @abstractmethod
    def flat(self, x: ir.Value, size: int, out: str) -> ir.Value:
        """`[..., heads, dim]` to `[..., size]`."""

    def convolve(self, x: ir.Value, mixer: ShortConv) -> ir.Value:
        """c * conv(b * x)."""
        g, size, layer = self.g, mixer.conv.size, mixer.into.site.layer
        name = f"layers.{layer}.conv"
        b, c, inner = self._split(x, (size, size, size), (f"{name}.b", f"{name}.c", f"{name}.x"))
        out = self.convolved(g.op("Mul", [b, inner], f"{name}.bx"), mixer.conv, layer)
        return g.op("Mul", [c, out], f"{name}.gated")

    def delta(self, x: ir.Value, gates: ir.Value, mixer: GatedDelta) -> ir.Value:
        """Convolution, delta rule, norm and gate, between the linear layers."""
        layer, heads, name = mixer.into.site.layer, mixer.heads, f"layers.{mixer.into.site.layer}.mix"
        qkv, z = self._split(x, (mixer.conv.size, heads.v_size), (f"{name}.mixed", f"{name}.z"))
        qkv = self.silu(self.convolved(qkv, mixer.conv, layer), f"{name}.qkv")
        sizes = (heads.k_size, heads.k_size, heads.v_size)
        q, k, v = self._split(qkv, sizes, (f"{name}.q", f"{name}.k", f"{name}.v"))
        b, a = self._split(gates, (heads.num_v_heads, heads.num_v_heads), (f"{name}.b", f"{name}.a"))
        inputs = DeltaInputs(
            self.heads(q, heads.num_k_heads, f"{name}.q.heads"),
            self.heads(k, heads.num_k_heads, f"{name}.k.heads"),
            self.heads(v, heads.num_v_heads, f"{name}.v.heads"),
            b,
            a,
            self._vector(mixer.a_log),
            self._vector(mixer.dt_bias),
        )
        out = self.norm(self.delta_rule(inputs, mixer, layer), mixer.norm)
        flat = self.flat(out, heads.v_size, f"{name}.delta.flat")
        return self.g.op("Mul", [flat, self.silu(z, f"{name}.z.silu")], f"{name}.delta.gated")

    def mamba(self, x: ir.Value, gates: ir.Value, mixer: Mamba2) -> ir.Value:
        """Convolution, sum, gate and norm, between the linear layers."""
        g, layer, heads, name = self.g, mixer.into.site.layer, mixer.heads, f"layers.{mixer.into.site.layer}.mix"
        z, mixed = self._split(x, (heads.v_size, mixer.conv.size), (f"{name}.z", f"{name}.mixed"))
        mixed = self.silu(self.convolved(mixed, mixer.conv, layer), f"{name}.vkq")
        sizes = (heads.v_size, heads.k_size, heads.k_size)
        v, k, q = self._split(mixed, sizes, (f"{name}.v", f"{name}.k", f"{name}.q"))
        v = self.heads(v, heads.num_v_heads, f"{name}.v.heads")
        dt = self._dt(gates, mixer, name)
        rate = g.op("Neg", [g.op("Exp", [self._vector(mixer.a_log)], f"{name}.rate.positive")], f"{name}.rate")
        narrow = g.op("Unsqueeze", [self._narrow(dt, f"{name}.dt.narrow"), g.shape_constant(-1)], f"{name}.dt.heads")
        inputs = SumInputs(
            self.heads(q, heads.num_k_heads, f"{name}.q.heads"),
            self.heads(k, heads.num_k_heads, f"{name}.k.heads"),
            g.op("Mul", [v, narrow], f"{name}.v.dt"),
            g.op("Mul", [dt, rate], f"{name}.decay"),
        )
        out = self._narrow(self.decayed_sum(inputs, heads, layer), f"{name}.sum.narrow")
        d = g.op(
            "Unsqueeze", [self._narrow(self._vector(mixer.d), f"{name}.d"), g.shape_constant(-1)], f"{name}.d.heads"
        )
        through = g.op("Add", [out, g.op("Mul", [v, d], f"{name}.v.d")], f"{name}.out")
        flat = self.flat(through, heads.v_size, f"{name}.out.flat")
        gated = g.op("Mul", [flat, self.silu(z, f"{name}.z.silu")], f"{name}.out.gated")
        return gated if mixer.norm is None else self.norm(gated, mixer.norm)

    def _dt(self, gates: ir.Value, mixer: Mamba2, name: str) -> ir.Value:
        """The step of every token and head, float32 `[..., v_heads]`."""
        g = self.g
        wide = g.op("Cast", [gates], f"{name}.dt.wide", to=ir.DataType.FLOAT)
        biased = g.op("Add", [wide, self._vector(mixer.dt_bias)], f"{name}.dt.biased")
        dt = g.op("Softplus", [biased], f"{name}.dt.all")
        low, high = mixer.dt_limits
        if low <= 0 and math.isinf(high):
            return dt
        bounds: list[ir.Value | None] = [
            g.constant(f"dt.{limit:g}", np.array(limit, np.float32)) if math.isfinite(limit) else None
            for limit in (low, high)
        ]
        return g.op("Clip", [dt, *bounds], f"{name}.dt")

    def _narrow(self, x: ir.Value, out: str) -> ir.Value:
        """Cast to the type of the linear layers' outputs."""
        return x if self.compute == ir.DataType.FLOAT else self.g.op("Cast", [x], out, to=self.compute)

    def _split(self, x: ir.Value, sizes: tuple[int, ...], names: tuple[str, ...]) -> list[ir.Value]:
        return self.g.ops("Split", [x, self.g.shape_constant(*sizes)], names, axis=-1)

    def _vector(self, name: str) -> ir.Value:
        return self.g.array(name, self.weights.vector(name).astype(np.float32, copy=False))
