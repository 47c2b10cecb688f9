"""Run some calibration sequences through the float model and yield the inputs of each layer's linear layers.

The tokens fit in memory (`search_sequences`), so nothing is written to disk. Knows nothing about integers.
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
"""Sequences of a search pass. With 512 tokens each, that is five tokens per channel of SmolLM2-135M's widest layer."""

MOST_BYTES = 512 << 20


class LayerInputs(NamedTuple):
    """Inputs and matrices of the linear layers of one decoder layer, by kind.

    inputs: float32 `[tokens, K]`; matrices: float32 `[N, K]`
    token_weight: `[tokens]`. For layers that write to the residual stream, 1 / mean square of the stream: the next norm
        divides by its root. For other layers, 1 / mean square of all outputs
    """

    layer: int
    inputs: Mapping[str, Array]
    matrices: Mapping[str, Array]
    token_weight: Mapping[str, Array]


def search_pass(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]]
) -> Iterator[LayerInputs]:
    """Yield the inputs of each decoder layer, and of the LM head last."""
    chosen = search_sequences(sequences, config)
    tables = rotary_tables(config, max(map(len, chosen)))
    x = embed(checkpoint, config.embedding, chosen)
    chunks = list(chunks_of(chosen, config))
    for block in config.blocks:
        weights = load_block(checkpoint, block)
        x, inputs, token_weight = _through(weights, block, x, chunks, tables)
        yield LayerInputs(block.layer, inputs, weights.matrices, token_weight)
    head = config.head.linear
    layer, kind = head.site
    hidden = normed(x, load_norm(checkpoint, config.final_norm), config.final_norm)
    matrix = checkpoint.load(head.weight_names[0])
    yield LayerInputs(layer, {kind: hidden}, {kind: matrix}, {kind: np.ones(len(hidden), np.float32)})


class _Part(NamedTuple):
    """One linear layer over one chunk: its inputs, the mean square of each token's output, the tokens' rows."""

    inputs: Array
    squares: Array
    rows: NDArray[np.int64]


def _through(
    weights: BlockWeights, block: Block, x: Array, chunks: Sequence[Chunk], tables: Tables
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Run all tokens through one block, chunks in parallel. Returns the residual stream, inputs and token weights."""
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
    """The first NUM_SEQUENCES; fewer if the activations of a wide model would exceed MOST_BYTES."""
    limit = max(1, MOST_BYTES // token_bytes(config))
    chosen: list[Sequence[int]] = []
    for sequence in sequences[:NUM_SEQUENCES]:
        if chosen and sum(map(len, chosen)) + len(sequence) > limit:
            break
        chosen.append(sequence[:limit])
    return chosen
