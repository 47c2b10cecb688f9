"""The reference: the decoder in numpy and float32, from the checkpoint. Every exported graph is compared with it.

Needs neither torch nor ONNX Runtime; the tests compare it with transformers. It shares the walker and the description
with the graphs, so an error there is in both. All sequences run through one block before the next block is read, so
memory holds one block's weights and the activations. Calibration runs the same blocks, and observes or replaces their
matrix products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import Block, Embedding, Head, ModelConfig, Norm, Rotary
from export.model.reference.operations import (
    Array,
    BlockWeights,
    NormWeights,
    NumpyOperations,
    Observe,
    Product,
    normed,
)
from export.model.rope import RopeTables, rope_tables
from export.model.walker import Stream, walk_block


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """Each sequence's hidden states after the final norm, float32 `[len, hidden]`, and the LM head."""

    hidden: list[Array]
    head: "HeadWeights"

    def logits(self, sequence_idx: int, start: int, stop: int) -> Array:
        """Logits of positions start .. stop of one sequence, float32 `[stop - start, vocab]`."""
        return self.head.logits(self.hidden[sequence_idx][start:stop])


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The LM head: matrix `[vocab, hidden]`, bias `[vocab]`."""

    matrix: Array
    bias: Array | None
    head: Head

    def logits(self, x: Array) -> Array:
        """Logits of hidden states `[n, hidden]` after the final norm."""
        return self.finished(np.asarray(x @ self.matrix.T))

    def finished(self, products: Array) -> Array:
        """Logits from the matrix product: add the bias, scale and cap."""
        logits = products if self.bias is None else products + self.bias
        if self.head.scale is not None:
            logits = logits * np.float32(self.head.scale)
        if self.head.softcap is not None:
            logits = np.float32(self.head.softcap) * np.tanh(logits / np.float32(self.head.softcap))
        return logits


def run_reference(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    *,
    on_layer: Callable[[], object] = lambda: None,
) -> ReferenceStates:
    """Run the sequences, each alone and causal; `on_layer` is called after each layer."""
    tables = rotary_tables(config, max(map(len, sequences)))
    edges = np.cumsum([0, *map(len, sequences)])
    x = embed(checkpoint, config.embedding, sequences)
    for block in config.blocks:
        x = run_block(load_block(checkpoint, block), block, x, edges, tables)
        on_layer()
    x = normed(x, load_norm(checkpoint, config.final_norm), config.final_norm)
    hidden = [x[start:stop] for start, stop in pairwise(edges)]
    return ReferenceStates(hidden, load_head(checkpoint, config.head))


def load_head(checkpoint: Checkpoint, head: Head) -> HeadWeights:
    """Read the LM head, which may be the embedding."""
    bias = checkpoint.load(head.linear.bias_names[0]) if head.linear.has_bias else None
    return HeadWeights(checkpoint.load(head.linear.weight_names[0]), bias, head)


def rotary_tables(config: ModelConfig, length: int) -> dict[Rotary, RopeTables]:
    """cos and sin of every rotary embedding of the blocks, for `length` positions."""
    found = {block.attention.rotary: None for block in config.blocks}
    return {rotary: rope_tables(rotary.rope, rotary.dim, length) for rotary in found if rotary is not None}


def embed(checkpoint: Checkpoint, embedding: Embedding, sequences: Sequence[Sequence[int]]) -> Array:
    """Embed all sequences, concatenated, `[tokens, hidden]`; each begins at position 0."""
    return embedded(
        checkpoint.load(f"{embedding.name}.weight"), load_positions(checkpoint, embedding), embedding, sequences
    )


def load_positions(checkpoint: Checkpoint, embedding: Embedding) -> Array | None:
    """Read the table of learned positions; None if there is none."""
    return None if embedding.positions is None else checkpoint.load(f"{embedding.positions}.weight")


def embedded(table: Array, positions: Array | None, embedding: Embedding, sequences: Sequence[Sequence[int]]) -> Array:
    """`embed` with tables that are already in memory."""
    x = table[np.concatenate([np.asarray(ids, np.int64) for ids in sequences])]
    if embedding.scale is not None:
        x = x * np.float32(embedding.scale)
    if positions is not None:
        x = x + np.concatenate([positions[: len(ids)] for ids in sequences])
    return np.asarray(x)


def load_norm(checkpoint: Checkpoint, norm: Norm) -> NormWeights:
    """Read a norm's weight and bias; InvalidCheckpoint if one is missing."""
    weight = checkpoint.load(f"{norm.name}.weight")
    bias = checkpoint.load(f"{norm.name}.bias") if norm.has_bias else None
    return NormWeights(weight + np.float32(1) if norm.adds_one else weight, bias)


def load_block(checkpoint: Checkpoint, block: Block) -> BlockWeights:
    """Read one block."""

    def stacked(names: Sequence[str]) -> Array:
        parts = [checkpoint.load(name) for name in names]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return BlockWeights(
        matrices={linear.site.kind: stacked(linear.weight_names) for linear in block.linears},
        biases={linear.site.kind: stacked(linear.bias_names) for linear in block.linears if linear.has_bias},
        norms={norm.name: load_norm(checkpoint, norm) for norm in block.norms},
    )


def run_block(
    weights: BlockWeights,
    block: Block,
    x: Array,
    edges: NDArray[np.int64],
    tables: dict[Rotary, RopeTables],
    *,
    product: Product | None = None,
    observe: Observe = lambda kind, array: None,
) -> Array:
    """Run one block over concatenated sequences, x `[tokens, hidden]` cut at `edges`. `product` replaces products."""
    stream = walk_block(NumpyOperations(weights, edges, tables, product, observe), block, Stream(x, None))
    assert stream.addend is not None
    return stream.value + stream.addend
