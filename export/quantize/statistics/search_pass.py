"""Run some calibration sequences through the float model and hand each layer's inputs to whoever asks.

The tokens are few enough for memory (`search_sequences`), so nothing lies on disk. Knows nothing about integers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from export.checkpoint.protocol import Checkpoint
from export.model.config import ModelConfig
from export.model.reference import PROJECTIONS, Array, Block, embed, load_block, rms_norm, run_block
from export.model.rope import RopeTables, rope_tables
from export.quantize.statistics.activation_stats import head_site
from export.quantize.statistics.collect import Chunk, chunks_of, token_bytes
from export.quantize.statistics.parallel import in_order

NUM_SEQUENCES = 16
"""Sequences of a search pass: 8,000 tokens of 512 are five for each channel of SmolLM2-135M's widest layer."""

MOST_BYTES = 512 << 20


class LayerInputs(NamedTuple):
    """What enters each linear layer of one decoder layer, end to end, and the matrices.

    inputs, matrices: by kind; token_weight: by kind, `[tokens]`, 1 / mean square of the residual stream that the
    output is added to (o, down): the norm behind it divides by just that. 1 / mean square of the output for others.
    """

    layer: int
    inputs: dict[str, Array]
    matrices: dict[str, Array]
    token_weight: dict[str, Array]

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
        tables = rope_tables(config.rope, config.head_dim, max(map(len, self.sequences)))
        x = embed(self._checkpoint, self.sequences)
        chunks = list(chunks_of(self.sequences, config))
        for layer in range(config.num_layers):
            block = load_block(self._checkpoint, config, layer)
            x, inputs, means = _through(block, config, layer, x, chunks, tables)
            weights = {
                kind: np.asarray(1 / np.maximum(mean, np.float32(1e-12)), np.float32) for kind, mean in means.items()
            }
            yield LayerInputs(layer, inputs, {kind: block.matrices[kind] for kind in PROJECTIONS}, weights)
        yield self._head(x)

    def _head(self, x: Array) -> LayerInputs:
        config = self._config
        site = head_site(config)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        h = rms_norm(x, self._checkpoint.load("model.norm.weight"), config.rms_norm_eps)
        head = self._checkpoint.load(name)
        return LayerInputs(site.layer, {site.kind: h}, {site.kind: head}, {site.kind: np.ones(len(h), np.float32)})


def _through(
    block: Block, config: ModelConfig, layer: int, x: Array, chunks: Sequence[Chunk], tables: RopeTables
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """All tokens through one layer, chunks side by side: the stream behind it, each product's inputs, and mean squares
    `[tokens]` of what its error is measured against."""
    inputs = {kind: np.empty((len(x), block.matrices[kind].shape[1]), np.float32) for kind in PROJECTIONS}
    squares = {kind: np.empty(len(x), np.float32) for kind in PROJECTIONS}
    following = np.empty_like(x)

    def run(chunk: Chunk) -> None:
        rows = slice(chunk.start, chunk.stop)

        def product(kind: str, h: Array) -> Array:
            inputs[kind][rows] = h
            out = block.product(kind, h)
            squares[kind][rows] = np.square(out).mean(1)
            return out

        following[rows] = run_block(block, config, layer, x[rows], chunk.edges, tables, product=product)

    for _ in in_order(run, chunks):
        pass
    residual = np.square(following).mean(1)
    means = {kind: np.full(len(x), square.mean(), np.float32) for kind, square in squares.items()}
    return following, inputs, {**means, "o": residual, "down": residual}


def search_sequences(sequences: Sequence[Sequence[int]], config: ModelConfig) -> list[Sequence[int]]:
    """The first NUM_SEQUENCES, fewer where the model is so wide that their activations exceed MOST_BYTES."""
    limit = max(1, MOST_BYTES // token_bytes(config))
    chosen: list[Sequence[int]] = []
    for sequence in sequences[:NUM_SEQUENCES]:
        if chosen and sum(map(len, chosen)) + len(sequence) > limit:
            break
        chosen.append(sequence[:limit])
    return chosen
