"""Run some calibration sequences through the float model and hand each layer's inputs to whoever asks.

The tokens are few enough for memory (`search_sequences`), so nothing lies on disk. Knows nothing about integers.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.calibrate import CHUNK_BYTES, token_bytes
from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.range_search import Sample
from export.reference import PROJECTIONS, Array, Block, embed, load_block, rms_norm, run_block
from export.rope import rope_tables
from export.smoothing import head_site

# Tokens that ranges are judged on, each sequence's first among them: it is where the massive activations are.
_TOKENS_A_SEQUENCE = 40
NUM_SEQUENCES = 24
"""Sequences of a search pass: 12,000 tokens of 512 are eight for each channel of SmolLM2-135M's widest layer."""


class LayerInputs(NamedTuple):
    """What enters each linear layer of one decoder layer, end to end, and the matrices.

    inputs, matrices: by kind; token_weight: by kind, `[tokens]`, 1 / mean square of the residual stream that the
    output is added to (o, down): the norm behind it divides by just that. 1 / mean square of the output for others.
    """

    layer: int
    inputs: dict[str, Array]
    matrices: dict[str, Array]
    token_weight: dict[str, Array]


class SearchPass:
    """Sequences to search on; iterate to get one `LayerInputs` a layer, the LM head's last."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]]) -> None:
        self._checkpoint, self._config = checkpoint, config
        self.sequences = search_sequences(sequences, config)
        self.edges = np.cumsum([0, *map(len, self.sequences)])

    def __iter__(self) -> Iterator[LayerInputs]:
        config = self._config
        tables = rope_tables(config.rope, config.head_dim, max(map(len, self.sequences)))
        x = embed(self._checkpoint, self.sequences)
        for layer in range(config.num_layers):
            block = load_block(self._checkpoint, config, layer)
            inputs: dict[str, Array] = {}
            means: dict[str, Array] = {}

            def product(kind: str, h: Array, block: Block = block, inputs: dict[str, Array] = inputs,
                        means: dict[str, Array] = means) -> Array:  # fmt: skip
                inputs[kind] = h
                out = block.product(kind, h)
                means[kind] = np.full(len(h), np.square(out).mean(), np.float32)
                return out

            x = run_block(block, config, layer, x, self.edges, tables, product=product)
            means["o"] = means["down"] = np.square(x).mean(1)
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

    def sample(self, inputs: Array, token_weight: Array) -> Sample:
        """Some tokens of one input: each sequence's first, the others spread evenly; fold = the sequence's number."""
        rows, folds = [], []
        for idx, (start, stop) in enumerate(pairwise(self.edges)):
            some = np.unique(np.linspace(start, stop - 1, _TOKENS_A_SEQUENCE).astype(np.int64))
            rows.append(some)
            folds.append(np.full(len(some), idx))
        picked: NDArray[np.int64] = np.concatenate(rows)
        return Sample(inputs[picked], np.concatenate(folds), token_weight[picked])


def search_sequences(sequences: Sequence[Sequence[int]], config: ModelConfig) -> list[Sequence[int]]:
    """The first NUM_SEQUENCES, fewer where the model is so wide that their activations exceed CHUNK_BYTES."""
    limit = max(1, CHUNK_BYTES * 2 // token_bytes(config))
    chosen: list[Sequence[int]] = []
    for sequence in sequences[:NUM_SEQUENCES]:
        if chosen and sum(map(len, chosen)) + len(sequence) > limit:
            break
        chosen.append(sequence[:limit])
    return chosen
