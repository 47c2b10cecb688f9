"""The decoder in plain numpy, float32, straight from the checkpoint: what every exported graph is compared with.

Independent of the graph and of ONNX Runtime, and needs no torch; the tests hold it against transformers.
Runs all sequences through one layer before it reads the next, so memory is one layer's weights and the activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.rope import RopeTables, rope_tables

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """Final normed hidden states, float32 `[len, hidden]` a sequence, and the LM head `[vocab, hidden]`."""

    hidden: list[Array]
    lm_head: Array

    def logits(self, sequence_idx: int, start: int, stop: int) -> Array:
        """Logits float32 `[stop - start, vocab]` of some positions of one sequence."""
        return np.asarray(self.hidden[sequence_idx][start:stop] @ self.lm_head.T)


def run_reference(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    *,
    on_layer: Callable[[], object] = lambda: None,
    on_input: Callable[[str, Array], object] = lambda _name, _inputs: None,
) -> ReferenceStates:
    """Run the sequences, each alone and causal; `on_layer` is called after each layer.

    `on_input` sees the float32 `[tokens, K]` that goes into each projection, by its name without `.weight`.
    """
    longest = max(map(len, sequences))
    tables = rope_tables(config.rope, config.head_dim, longest)
    edges = np.cumsum([0, *map(len, sequences)])
    embeddings = checkpoint.load("model.embed_tokens.weight")
    x = embeddings[np.concatenate([np.asarray(ids, np.int64) for ids in sequences])]
    del embeddings
    for layer in range(config.num_layers):
        x = _layer(checkpoint, config, layer, x, edges, tables, on_input)
        on_layer()
    x = _rms_norm(x, checkpoint.load("model.norm.weight"), config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    hidden = [x[start:stop] for start, stop in pairwise(edges)]
    return ReferenceStates(hidden, checkpoint.load(head))


def _layer(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    x: Array,
    edges: NDArray[np.int64],
    tables: RopeTables,
    on_input: Callable[[str, Array], object],
) -> Array:
    prefix = f"model.layers.{layer}"

    def linear(name: str, inputs: Array, *, has_bias: bool) -> Array:
        on_input(f"{prefix}.{name}", inputs)
        out = inputs @ checkpoint.load(f"{prefix}.{name}.weight").T
        return out + checkpoint.load(f"{prefix}.{name}.bias") if has_bias else out

    def norm(name: str, inputs: Array) -> Array:
        return _rms_norm(inputs, checkpoint.load(f"{prefix}.{name}.weight"), config.rms_norm_eps)

    h = norm("input_layernorm", x)
    q, k, v = (
        linear(f"self_attn.{part}_proj", h, has_bias=config.qkv_bias).reshape(len(x), -1, config.head_dim)
        for part in "qkv"
    )
    if config.qk_norm:
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    attended = np.concatenate(
        [_attention(q[a:b], k[a:b], v[a:b], tables, config.sliding_windows[layer]) for a, b in pairwise(edges)]
    )
    x = x + linear("self_attn.o_proj", attended, has_bias=config.o_bias)
    h = norm("post_attention_layernorm", x)
    gate = linear("mlp.gate_proj", h, has_bias=config.mlp_bias)
    gate = gate / (1 + np.exp(-np.clip(gate, -80, None)))  # exp(80) is near float32's end
    return x + linear(
        "mlp.down_proj", gate * linear("mlp.up_proj", h, has_bias=config.mlp_bias), has_bias=config.mlp_bias
    )


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(epsilon)) * weight)


def _rotate(x: Array, tables: RopeTables) -> Array:
    """Rotate pairs (i, i + head_dim / 2) of `[n, heads, head_dim]` by their position's angle."""
    half = x.shape[-1] // 2
    cos, sin = tables.cos[: len(x), None], tables.sin[: len(x), None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(q: Array, k: Array, v: Array, tables: RopeTables, window: int | None) -> Array:
    """Causal attention of one sequence; q `[n, heads, d]`, k and v `[n, kv_heads, d]`; returns `[n, heads * d]`."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    q, k = _rotate(q, tables), _rotate(k, tables)
    distance = np.arange(n)[:, None] - np.arange(n)
    hidden = (distance < 0) | (distance >= (window or n))
    out = np.empty((n, heads, dim), np.float32)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(np.float32(dim))
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights @ v[:, head // group] / weights.sum(-1, keepdims=True)
    return out.reshape(n, -1)
