"""The decoder in plain numpy, float32, straight from the checkpoint: what every exported graph is compared with.

Independent of the graph and of ONNX Runtime, and needs no torch; the tests hold it against transformers.
Runs all sequences through one layer before it reads the next, so memory is one layer's weights and the activations.
Calibration runs the same layers: it watches what goes into each matrix product, or puts another product in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.config import ModelConfig
from export.model.rope import RopeTables, rope_tables

Array = NDArray[np.float32]

# Rows of a sequence whose attention scores are computed at once: half of the masked scores are never computed.
_ATTENTION_ROWS = 128


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """Final normed hidden states, float32 `[len, hidden]` a sequence, and the LM head `[vocab, hidden]`."""

    hidden: list[Array]
    lm_head: Array

    def logits(self, sequence_idx: int, start: int, stop: int) -> Array:
        """Logits float32 `[stop - start, vocab]` of some positions of one sequence."""
        return np.asarray(self.hidden[sequence_idx][start:stop] @ self.lm_head.T)


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer's tensors, float32. Projections of the same input are stacked: `[N, K]`, N outputs.

    matrices, biases: by kind: qkv, o, gate_up, down; a kind without biases is not in `biases`
    head_norms: of q and k, for families that norm each head
    """

    attention_norm: Array
    mlp_norm: Array
    matrices: dict[str, Array]
    biases: dict[str, Array]
    head_norms: tuple[Array, Array] | None

    def product(self, kind: str, x: Array) -> Array:
        """x `[n, K]` times the matrix of that kind, without its bias."""
        return np.asarray(x @ self.matrices[kind].T)


Product = Callable[[str, Array], Array]
"""(kind, x `[n, K]`) -> `[n, N]`, without bias: stands in for `Block.product`."""

Observe = Callable[[str, Array], object]
"""("k" or "v", what the KV cache would hold of one sequence: `[n, kv_heads, head_dim]`, k rotated)."""

PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The checkpoint's names of what each kind of linear layer stacks, below `model.layers.L`."""


def run_reference(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    *,
    on_layer: Callable[[], object] = lambda: None,
) -> ReferenceStates:
    """Run the sequences, each alone and causal; `on_layer` is called after each layer."""
    tables = rope_tables(config.rope, config.head_dim, max(map(len, sequences)))
    edges = np.cumsum([0, *map(len, sequences)])
    x = embed(checkpoint, sequences)
    for layer in range(config.num_layers):
        block = load_block(checkpoint, config, layer)
        x = run_block(block, config, layer, x, edges, tables)
        on_layer()
    x = rms_norm(x, checkpoint.load("model.norm.weight"), config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    hidden = [x[start:stop] for start, stop in pairwise(edges)]
    return ReferenceStates(hidden, checkpoint.load(head))


def embed(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> Array:
    """Embeddings of all sequences end to end, `[tokens, hidden]`."""
    ids = np.concatenate([np.asarray(ids, np.int64) for ids in sequences])
    return np.asarray(checkpoint.load("model.embed_tokens.weight")[ids])


def load_block(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> Block:
    """Read one layer."""
    prefix = f"model.layers.{layer}"

    def stacked(names: Sequence[str], suffix: str) -> Array:
        parts = [checkpoint.load(f"{prefix}.{name}.{suffix}") for name in names]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    head_norms = None
    if config.qk_norm:
        q_norm, k_norm = (checkpoint.load(f"{prefix}.self_attn.{part}_norm.weight") for part in "qk")
        head_norms = (q_norm, k_norm)
    return Block(
        attention_norm=checkpoint.load(f"{prefix}.input_layernorm.weight"),
        mlp_norm=checkpoint.load(f"{prefix}.post_attention_layernorm.weight"),
        matrices={kind: stacked(names, "weight") for kind, names in PROJECTIONS.items()},
        biases={kind: stacked(names, "bias") for kind, names in PROJECTIONS.items() if has_bias[kind]},
        head_norms=head_norms,
    )


def run_block(
    block: Block,
    config: ModelConfig,
    layer: int,
    x: Array,
    edges: NDArray[np.int64],
    tables: RopeTables,
    *,
    product: Product | None = None,
    observe: Observe = lambda kind, array: None,
) -> Array:
    """One layer over sequences end to end: x `[tokens, hidden]`, cut at `edges`. `product`: instead of the block's."""
    multiply = product or block.product

    def linear(kind: str, inputs: Array) -> Array:
        out = multiply(kind, inputs)
        return out + block.biases[kind] if kind in block.biases else out

    h = rms_norm(x, block.attention_norm, config.rms_norm_eps)
    heads = linear("qkv", h).reshape(len(x), -1, config.head_dim)
    q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
    if block.head_norms:
        q = rms_norm(q, block.head_norms[0], config.rms_norm_eps)
        k = rms_norm(k, block.head_norms[1], config.rms_norm_eps)
    attended = np.empty((len(x), config.num_heads * config.head_dim), np.float32)
    for a, b in pairwise(edges):
        rotated = _rotate(k[a:b], tables)
        observe("k", rotated)
        observe("v", v[a:b])
        attended[a:b] = _attention(_rotate(q[a:b], tables), rotated, v[a:b], config.sliding_windows[layer])
    x = x + linear("o", attended)
    h = rms_norm(x, block.mlp_norm, config.rms_norm_eps)
    gate, up = np.split(linear("gate_up", h), 2, axis=1)
    activated = _silu(gate)
    activated *= up
    return x + linear("down", activated)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """Root mean square norm over the last axis (arXiv:1910.07467)."""
    square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    normed = x / np.sqrt(square + np.float32(epsilon))
    normed *= weight
    return np.asarray(normed)


def _silu(x: Array) -> Array:
    """x / (1 + exp(-x)); beyond float32's end exp is infinite, and the quotient 0, as it should be."""
    out = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    return np.divide(x, out, out=out)


def _rotate(x: Array, tables: RopeTables) -> Array:
    """Rotate pairs (i, i + head_dim / 2) of `[n, heads, head_dim]` by their position's angle."""
    half = x.shape[-1] // 2
    cos, sin = tables.cos[: len(x), None], tables.sin[: len(x), None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal attention of one sequence; q `[n, heads, d]`, k and v `[n, kv_heads, d]`; returns `[n, heads * d]`.

    The query heads that share a key-value head are rows of one product.
    """
    n, num_heads, dim = q.shape
    num_kv, group = k.shape[1], num_heads // k.shape[1]
    grouped = (q / np.sqrt(np.float32(dim))).reshape(n, num_kv, group, dim).transpose(1, 2, 0, 3)
    keys, values = np.ascontiguousarray(k.transpose(1, 2, 0)), np.ascontiguousarray(v.transpose(1, 0, 2))
    out = np.empty((n, num_kv, group, dim), np.float32)
    for start in range(0, n, _ATTENTION_ROWS):
        stop = min(start + _ATTENTION_ROWS, n)
        first = max(0, start - window + 1) if window else 0
        masked = first if window else start  # without a window, all columns before this are seen by every row
        distance = np.arange(start, stop)[:, None] - np.arange(masked, stop)
        mask = np.where((distance < 0) | (distance >= (window or n)), np.float32(-np.inf), np.float32(0))
        rows = grouped[:, :, start:stop].reshape(num_kv, -1, dim)
        scores = rows @ keys[:, :, first:stop]
        scores.reshape(num_kv, group, stop - start, -1)[..., masked - first :] += mask
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = scores @ values[:, first:stop]
        mixed /= scores.sum(-1, keepdims=True)
        out[start:stop] = mixed.reshape(num_kv, group, -1, dim).transpose(2, 0, 1, 3)
    return out.reshape(n, -1)
