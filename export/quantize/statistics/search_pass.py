"""Run some calibration sequences through the float model and hand each layer's inputs to whoever asks.

The tokens are few enough for memory (`search_sequences`), so nothing lies on disk. Knows nothing about integers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import Block, ModelConfig
from export.model.reference.forward import embed, load_block, load_norm, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights, normed
from export.quantize.statistics.collect import Chunk, Tables, chunks_of, token_bytes
from export.quantize.statistics.parallel import in_order

NUM_SEQUENCES = 16
"""Sequences of a search pass: 8,000 tokens of 512 are five for each channel of SmolLM2-135M's widest layer."""

MOST_BYTES = 512 << 20


class LayerInputs(NamedTuple):
    """What enters each linear layer of one decoder layer, end to end, and the matrices.

    inputs, matrices: by kind; token_weight: by kind, `[tokens]`, 1 / mean square of the residual stream that the
    output is added to: the norm behind it divides by just that. 1 / mean square of the output for other layers.
    """

    layer: int
    inputs: Mapping[str, Array]
    matrices: Mapping[str, Array]
    token_weight: Mapping[str, Array]

    def num_inputs(self, kind: str) -> int:
        """K of a kind's matrix."""
        return int(self.matrices[kind].shape[1])


class SearchPass:
    """Sequences to search on; iterate to get one `LayerInputs` a layer, the LM head's last."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]]) -> None:
        self._checkpoint, self._config = checkpoint, config
        self.sequences = search_sequences(sequences, config)

    def __iter__(self) -> Iterator[LayerInputs]:
        config = self._config
        tables = rotary_tables(config, max(map(len, self.sequences)))
        x = embed(self._checkpoint, config.embedding, self.sequences)
        chunks = list(chunks_of(self.sequences, config))
        for block in config.blocks:
            weights = load_block(self._checkpoint, block)
            x, inputs, token_weight = _through(weights, block, x, chunks, tables)
            yield LayerInputs(block.layer, inputs, weights.matrices, token_weight)
        yield self._head(x)

    def _head(self, x: Array) -> LayerInputs:
        config, head = self._config, self._config.head.linear
        kind = head.site.kind
        h = normed(x, load_norm(self._checkpoint, config.final_norm), config.final_norm)
        matrix = self._checkpoint.load(head.weight_names[0])
        return LayerInputs(head.site.layer, {kind: h}, {kind: matrix}, {kind: np.ones(len(h), np.float32)})


class _Part(NamedTuple):
    """What one product saw of a chunk: its inputs, the mean square of each output, and the tokens' rows."""

    inputs: Array
    squares: Array
    rows: NDArray[np.int64]


def _through(
    weights: BlockWeights, block: Block, x: Array, chunks: Sequence[Chunk], tables: Tables
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """All tokens through one block, chunks side by side: the stream behind it, each product's inputs, and the weight
    of each of their tokens."""
    following = np.empty_like(x)

    def run(chunk: Chunk) -> dict[str, _Part]:
        parts: dict[str, _Part] = {}

        def product(kind: str, h: Array, rows: NDArray[np.int64] | None) -> Array:
            out = weights.product(kind, h)
            where = chunk.start + (np.arange(len(h)) if rows is None else rows)
            parts[kind] = _Part(h, np.square(out).mean(1), where)
            return out

        some = slice(chunk.start, chunk.stop)
        following[some] = run_block(weights, block, x[some], chunk.edges, tables, product=product)
        return parts

    found = list(in_order(run, chunks))
    residual = np.square(following).mean(1)
    inputs, token_weight = {}, {}
    for linear in block.linears:
        kind = linear.site.kind
        parts = [part.pop(kind) for part in found if kind in part]
        if not parts:  # an expert that no token chose
            continue
        inputs[kind] = np.concatenate([part.inputs for part in parts])
        rows = np.concatenate([part.rows for part in parts])
        mean = np.concatenate([part.squares for part in parts]).mean()
        mean = residual[rows] if linear.writes_stream else np.full(len(rows), mean, np.float32)
        token_weight[kind] = np.asarray(1 / np.maximum(mean, np.float32(1e-12)), np.float32)
    return following, inputs, token_weight


def search_sequences(sequences: Sequence[Sequence[int]], config: ModelConfig) -> list[Sequence[int]]:
    """The first NUM_SEQUENCES, fewer where the model is so wide that their activations exceed MOST_BYTES."""
    limit = max(1, MOST_BYTES // token_bytes(config))
    chosen: list[Sequence[int]] = []
    for sequence in sequences[:NUM_SEQUENCES]:
        if chosen and sum(map(len, chosen)) + len(sequence) > limit:
            break
        chosen.append(sequence[:limit])
    return chosen
