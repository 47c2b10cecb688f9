"""Run some calibration sequences through the float model and keep the inputs of one layer's linear layers at a time.

The tokens fit in memory (`search_sequences`), so nothing is written to disk. Knows nothing about integers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import Block, ModelConfig
from export.model.reference.forward import embed, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights
from export.quantize.statistics.collect import Chunk, chunks_of
from export.quantize.statistics.parallel import in_order

NUM_SEQUENCES = 16
"""Sequences of a search pass. With 512 tokens each, that is five tokens per channel of SmolLM2-135M's widest layer."""

MOST_BYTES = 512 << 20
"""Most bytes of the inputs that are kept."""


class SiteInputs(NamedTuple):
    """Inputs of one linear layer, float32 `[tokens, K]`, and what each token's errors count, `[tokens]`.

    For layers that write to the residual stream, that is 1 / mean square of the stream: the next norm divides by its
    root. For others it is 1.
    """

    x: Array
    token_weight: Array


class SearchPass:
    """Runs the sequences through one block after the other. `stream`: the hidden states, `[tokens, hidden]`."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]]) -> None:
        chosen = search_sequences(sequences, config)
        self.stream = embed(checkpoint, config.embedding, chosen)
        self._tables = rotary_tables(config, max(map(len, chosen)))
        self._chunks = list(chunks_of(chosen, config))

    def through(self, block: Block, weights: BlockWeights) -> dict[str, SiteInputs]:
        """Run all tokens through one block, chunks in parallel; the inputs by kind, without experts that got none."""
        following = np.empty_like(self.stream)
        whole: dict[str, Array] = {}  # filled chunk by chunk, so that no input is in memory twice
        chosen: dict[str, list[tuple[NDArray[np.int64], Array]]] = {}  # of experts, which get some tokens

        def run(chunk: Chunk) -> None:
            some = slice(chunk.start, chunk.stop)

            def product(kind: str, x: Array, rows: NDArray[np.int64] | None) -> Array:
                if rows is None:
                    whole.setdefault(kind, np.empty((len(following), x.shape[1]), np.float32))[some] = x
                else:
                    chosen.setdefault(kind, []).append((chunk.start + rows, x))
                return weights.product(kind, x)

            stream, edges = self.stream[some], chunk.edges
            following[some] = run_block(weights, block, stream, edges, self._tables, product=product)

        for _ in in_order(run, self._chunks):
            pass
        self.stream = following
        square = np.einsum("nk,nk->n", following, following) / following.shape[1]
        every = np.asarray(1 / np.maximum(square, np.float32(1e-12)), np.float32)

        def weight_of(kind: str, rows: NDArray[np.int64] | slice) -> Array:
            return every[rows] if block.linear(kind).writes_stream else np.ones_like(every[rows])

        found = {kind: SiteInputs(x, weight_of(kind, np.s_[:])) for kind, x in whole.items()}
        for kind, parts in chosen.items():
            parts.sort(key=lambda part: int(part[0][0]))  # chunks end in any order
            rows, inputs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            found[kind] = SiteInputs(inputs, weight_of(kind, rows))
        return found


def search_sequences(sequences: Sequence[Sequence[int]], config: ModelConfig) -> list[Sequence[int]]:
    """The first NUM_SEQUENCES; fewer if the inputs of a wide model would exceed MOST_BYTES."""
    limit = max(1, MOST_BYTES // input_bytes(config))
    chosen: list[Sequence[int]] = []
    for sequence in sequences[:NUM_SEQUENCES]:
        if chosen and sum(map(len, chosen)) + len(sequence) > limit:
            break
        chosen.append(sequence[:limit])
    return chosen


def input_bytes(config: ModelConfig) -> int:
    """Bytes per token of the inputs of one block's linear layers."""
    shares = ((linear.num_inputs, config.share_of_tokens(linear.site)) for linear in config.blocks[0].linears)
    return int(4 * sum(num_inputs * share for num_inputs, share in shares))
