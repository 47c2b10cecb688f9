"""The forward pass of a decoder's block, over any set of operations.

    ORT's fused operators      graph/ort/operations.py
    standard ONNX, opset 24    graph/standard/operations.py
    plain ONNX, opset 21       graph/standard/operations.py with plain_attention.py
    numpy                      model/reference/operations.py

Knows how blocks are connected, and nothing about weights or numbers.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from export.model.description import (
    Attention,
    Block,
    Experts,
    GatedDelta,
    Latent,
    Linear,
    Mamba2,
    Mixer,
    Mlp,
    Norm,
    ShortConv,
)

V = TypeVar("V")


class Stream(NamedTuple, Generic[V]):
    """The residual stream: its value, and an addend that the next norm adds, so that sum and norm can be fused."""

    value: V
    addend: V | None


class Operations(Protocol[V]):
    """The operations that a block is computed with. A value is `[..., channels]`."""

    def norm(self, x: V, norm: Norm) -> V: ...

    def add_norm(self, stream: Stream[V], norm: Norm) -> tuple[V, V]:
        """The norm of the stream, and the sum of the stream's value and addend."""
        ...

    def sum(self, stream: Stream[V]) -> tuple[V, V]:
        """The stream's sum as the input of a linear layer, and as the stream's value."""
        ...

    def add(self, x: V, y: V) -> V: ...

    def scale(self, x: V, factor: float) -> V: ...

    def clip(self, x: V, limit: float) -> V:
        """x between -limit and limit."""
        ...

    def linear(self, x: V, linear: Linear) -> V:
        """x times the transposed weight, and the bias if there is one."""
        ...

    def attend(self, qkv: V, block: Block) -> V:
        """Attention over queries, keys and values, stacked along the channels; returns all heads, concatenated."""
        ...

    def convolve(self, x: V, mixer: ShortConv) -> V:
        """c * conv(b * x) of b, c and x stacked along the channels; reads and writes the rows' states."""
        ...

    def delta(self, x: V, gates: V, mixer: GatedDelta) -> V:
        """The input of `mixer.out` from the outputs of `into` and `gates`; reads and writes the rows' states."""
        ...

    def mamba(self, x: V, gates: V, mixer: Mamba2) -> V:
        """As `delta`, of Mamba 2."""
        ...

    def activate(self, up: V, mlp: Mlp) -> V:
        """The input of `down`: act(up), or act(gate) * up if `up` is gate and up stacked."""
        ...

    def mix(self, x: V, experts: Experts, run: Callable[[V, Mlp], V]) -> V:
        """The weighted sum of the chosen experts; `run` computes one expert for some tokens."""
        ...

    def split(self, x: V, sizes: Sequence[int]) -> Sequence[V]:
        """Cut the channels into parts."""
        ...

    def unfold(self, q: V, kv: V, rotating: V, attention: Attention) -> V:
        """Queries, keys and values, stacked along the channels, as `attend` takes them: see `Latent`."""
        ...

    def without_padding(self, attended: V, attention: Attention) -> V:
        """The channels of each head that are values."""
        ...

    def gate(self, x: V, logits: V) -> V:
        """x times the sigmoid of logits `[..., 1]` or `[..., channels]`."""
        ...


def walk_block(ops: Operations[V], block: Block, stream: Stream[V]) -> Stream[V]:
    """Run a block: the residual stream before it to the stream after it."""
    hidden, x = _normed(ops, stream, block.attention_norm)
    attended = walk_attention(ops, block, hidden) if block.has_attention else walk_mixer(ops, block.mixer, hidden)
    if block.beside is not None:
        attended = ops.add(attended, walk_mixer(ops, block.beside, hidden))
    attended = _added(ops, attended, block.attention_out_norm, block.residual_scale)
    if block.is_parallel:
        beside = hidden if block.mlp_norm is None else ops.norm(x, block.mlp_norm)
        out = _added(ops, walk_mlp(ops, block.mlp, beside), block.mlp_out_norm, block.residual_scale)
        return Stream(x, ops.add(attended, out))
    hidden, x = _normed(ops, Stream(x, attended), block.mlp_norm)
    return Stream(x, _added(ops, walk_mlp(ops, block.mlp, hidden), block.mlp_out_norm, block.residual_scale))


def walk_mixer(ops: Operations[V], mixer: Mixer, hidden: V) -> V:
    """What a block has instead of attention, or beside it."""
    assert not isinstance(mixer, Attention)
    x = ops.linear(hidden, mixer.into)
    if isinstance(mixer, ShortConv):
        return ops.linear(ops.convolve(x, mixer), mixer.out)
    gates = ops.linear(hidden, mixer.gates)
    mixed = ops.delta(x, gates, mixer) if isinstance(mixer, GatedDelta) else ops.mamba(x, gates, mixer)
    return ops.linear(mixed, mixer.out)


def walk_attention(ops: Operations[V], block: Block, hidden: V) -> V:
    """A block's attention."""
    attention = block.attention
    qkv = ops.linear(hidden, attention.qkv)
    if attention.clip is not None:
        qkv = ops.clip(qkv, attention.clip)
    if attention.latent is None:
        attended = ops.attend(qkv, block)
    else:
        attended = ops.without_padding(ops.attend(walk_latent(ops, qkv, attention, attention.latent), block), attention)
    if attention.gate is not None:
        attended = ops.gate(attended, ops.linear(hidden, attention.gate))
    return ops.linear(attended, attention.o)


def walk_latent(ops: Operations[V], x: V, attention: Attention, latent: Latent) -> V:
    """Queries, keys and values of latent attention from the output of `qkv`."""
    q, narrow, rotating = ops.split(x, attention.split_sizes)
    if latent.q is not None and latent.q_norm is not None:
        q = ops.linear(ops.norm(q, latent.q_norm), latent.q)
    kv = ops.linear(ops.norm(narrow, latent.kv_norm), latent.kv)
    return ops.unfold(q, kv, rotating, attention)


def walk_mlp(ops: Operations[V], mlp: Mlp | Experts, hidden: V) -> V:
    """A block's MLP, or its mixture of experts."""

    def run(x: V, one: Mlp) -> V:
        return ops.linear(ops.activate(ops.linear(x, one.up), one), one.down)

    if isinstance(mlp, Mlp):
        return run(hidden, mlp)
    mixed = ops.mix(hidden, mlp, run)
    if mlp.shared is None:
        return mixed
    beside = run(hidden, mlp.shared)
    if mlp.shared_gate is not None:
        beside = ops.gate(beside, ops.linear(hidden, mlp.shared_gate))
    return ops.add(mixed, beside)


def walk_final_norm(ops: Operations[V], stream: Stream[V], norm: Norm) -> V:
    """The input of the LM head."""
    return _normed(ops, stream, norm)[0]


def _normed(ops: Operations[V], stream: Stream[V], norm: Norm | None) -> tuple[V, V]:
    """What reads the stream, and the stream's value."""
    if norm is None:
        return ops.sum(stream)
    return (ops.norm(stream.value, norm), stream.value) if stream.addend is None else ops.add_norm(stream, norm)


def _added(ops: Operations[V], x: V, norm: Norm | None, scale: float | None) -> V:
    """What attention or MLP add to the stream."""
    normed = x if norm is None else ops.norm(x, norm)
    return normed if scale is None else ops.scale(normed, scale)
