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

    @property
    def num_outputs(self) -> int:
        return len(self.matrix)

    def between(self, some: slice) -> "HeadWeights":
        """Some rows of the head: the logits of some tokens of the vocabulary."""
        return HeadWeights(self.matrix[some], None if self.bias is None else self.bias[some], self.head)

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


def load_head(checkpoint: Checkpoint, head: Head, matrix: Array | None = None) -> HeadWeights:
    """Read the LM head, which may be the embedding; `matrix` is its own where it is in memory already."""
    bias = checkpoint.load(head.linear.bias_names[0]) if head.linear.has_bias else None
    return HeadWeights(checkpoint.load(head.linear.weight_names[0]) if matrix is None else matrix, bias, head)


def rotary_tables(config: ModelConfig, length: int) -> dict[Rotary, RopeTables]:
    """cos and sin of every rotary embedding of the blocks, for `length` positions."""
    found = {block.attention.rotary: None for block in config.attention_blocks}
    return {rotary: rope_tables(rotary.rope, rotary.dim, length) for rotary in found if rotary is not None}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a text's tokens are embedded with: the rows of the table that occur in it, and the positions.

    token_ids: those that occur, sorted; rows: their embeddings, `[n, hidden]`; positions: those that are learned,
        `[length, hidden]`; norm: behind the sum
    """

    token_ids: NDArray[np.int64]
    rows: Array
    positions: Array | None
    norm: NormWeights | None
    embedding: Embedding

    def embed(self, sequences: Sequence[Sequence[int]]) -> Array:
        """Embed sequences of these tokens, concatenated, `[tokens, hidden]`; each begins at position 0."""
        x = self.rows[np.searchsorted(self.token_ids, np.concatenate([np.asarray(ids) for ids in sequences]))]
        if self.embedding.scale is not None:
            x = x * np.float32(self.embedding.scale)
        if self.positions is not None:
            x = x + np.concatenate([self.positions[: len(ids)] for ids in sequences])
        if self.norm is not None and self.embedding.norm is not None:
            x = normed(np.asarray(x), self.norm, self.embedding.norm)
        return np.asarray(x)


def load_vocabulary(checkpoint: Checkpoint, embedding: Embedding, sequences: Sequence[Sequence[int]]) -> Vocabulary:
    """Read what these sequences are embedded with."""
    token_ids = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in sequences]))
    parts, start = [], 0
    for piece in checkpoint.pieces(f"{embedding.name}.weight"):
        first, last = np.searchsorted(token_ids, [start, start + len(piece)])
        parts.append(piece[token_ids[first:last] - start])
        start += len(piece)
    positions = norm = None
    if embedding.positions is not None:
        positions = checkpoint.load(f"{embedding.positions}.weight")[embedding.position_offset :]
    if embedding.norm is not None:
        norm = load_norm(checkpoint, embedding.norm)
    return Vocabulary(token_ids, np.concatenate(parts), positions, norm, embedding)


def embed(checkpoint: Checkpoint, embedding: Embedding, sequences: Sequence[Sequence[int]]) -> Array:
    """Embed all sequences, concatenated, `[tokens, hidden]`; each begins at position 0."""
    return load_vocabulary(checkpoint, embedding, sequences).embed(sequences)


def load_norm(checkpoint: Checkpoint, norm: Norm) -> NormWeights:
    """Read a norm's weight and bias; InvalidCheckpoint if one is missing."""
    weight = checkpoint.load(f"{norm.name}.weight") if norm.has_weight else np.ones(norm.size, np.float32)
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
        tensors={
            **{name: checkpoint.load(name).reshape(-1) for name in block.vectors},
            **{name: checkpoint.load(name) for mixer in block.mixers for name in mixer.tensors},
        },
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
