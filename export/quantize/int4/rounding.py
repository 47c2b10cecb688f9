"""Round a model's linear layers to int4 blocks with GPTQ, each on the inputs that the rounded layers before it produce.

Two sets of hidden states pass through the layers: those of the float model, and those of the model whose earlier layers
are already rounded. GPTQ's input is the second, and its target the float layer's output for the first, so that it also
corrects errors of earlier layers (GPTAQ, arXiv:2504.02692). Each finished layer is saved, so an interrupted run
continues there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.calibration.dataset import sequences_digest
from export.checkpoint.protocol import Checkpoint
from export.model.description import Block, Linear, ModelConfig, Site
from export.model.reference.forward import embed, load_block, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights
from export.quantize.int4.row_files import RowFiles
from export.quantize.rounding.blocks import SHRINKAGE, gptq_blocks, nearest_rows
from export.quantize.rounding.gptq import MAX_GPTQ_INPUTS, GramMatrix, drift
from export.quantize.statistics.activation_stats import not_finite
from export.quantize.statistics.collect import fingerprint_of, token_bytes
from export.quantize.statistics.store import load_arrays, save_arrays
from export.schemes.forms import Blocks
from export.storage.blocks import QuantizedRows, dequantize_rows, quantize_rows
from runtime.machine.progress import progress_bar

PIECE = 128
"""Tokens of a piece of calibration text. Pieces are short because massive activations are at a piece's first token."""

NUM_PIECES = 96
"""Most pieces used: 12,000 tokens, eight per channel of SmolLM2-135M's widest layer."""

_MOST_SPECIAL = 100.0
"""Highest weight of a token, relative to the median token. A layer makes a massive activation only at a piece's first
token, and all later layers and tokens depend on it. In SmolLM2-135M's layer 11, rounding `down` to nearest costs KL
0.038 nats, GPTQ with equal weights 0.009, and with the first token's weight at 10, 100, 1,000 and 20,000 0.007, 0.0041,
0.0033 and 0.0050. In layers without a massive activation, a higher weight only harms."""

# Bytes of activations of all pieces. They are held at once, and the inputs of a layer's linear layers twice.
MOST_BYTES = 1 << 30

_ERROR_STRIDE = 16  # output errors are computed for one token in 16; only the report uses them

Plan = Mapping[Site, Blocks]
"""The blocks of every site to round. The graph stores the others in the scheme's form."""


def round_layers(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]], plan: Plan, workdir: Path
) -> tuple[RowFiles, dict[Site, float]]:
    """Round all sites of the plan; the matrices are written to `workdir`. CalibrationFailed if an input is not finite.

    Also returns each site's output error: mean square on the calibration text, relative to the exact output's. A run
    over the same text, model and plan that was interrupted in `workdir` is continued.
    """
    files = RowFiles(workdir / "rows")
    edges = np.cumsum([0, *map(len, sequences)])
    tables = rotary_tables(config, max(map(len, sequences)))
    embedded = embed(checkpoint, config.embedding, sequences)
    state = _State.begin(workdir, _fingerprint(checkpoint, config, sequences, plan), embedded)
    with progress_bar("round", total=config.num_layers, unit="layer") as bar:
        bar.update(state.layers_done)
        for block in config.blocks[state.layers_done :]:
            weights = load_block(checkpoint, block)
            exact = _ExactLayer(weights, state.exact)
            state.exact = run_block(weights, block, state.exact, edges, tables, product=exact)
            rounder = _LayerRounder(block, weights, exact, state.exact, plan, files)
            state.rounded = run_block(weights, block, state.rounded, edges, tables, product=rounder)
            state.finish(block.layer, rounder.errors)
            bar.update(1)
    return files, state.errors


def pieces_of(sequences: Sequence[Sequence[int]], config: ModelConfig) -> list[Sequence[int]]:
    """Cut the text into pieces, taken from all sequences in turn, and from another place in each.

    At most NUM_PIECES; fewer if the activations of a wide model would exceed MOST_BYTES.
    """
    most = max(1, MOST_BYTES // (token_bytes(config) * PIECE))
    pieces: list[Sequence[int]] = []
    for turn in range(max(-(-len(sequence) // PIECE) for sequence in sequences)):
        for idx, sequence in enumerate(sequences):
            parts = max(1, len(sequence) // PIECE)
            if turn < parts:
                start = (turn + idx) % parts * PIECE
                pieces.append(sequence[start : start + PIECE])
            if len(pieces) == min(NUM_PIECES, most):
                return pieces
    return pieces


class _ExactLayer:
    """Computes one block's products in float32, and keeps their inputs.

    share: by kind, each token's mean square output, relative to the residual stream that enters the block
    Nothing is kept for an expert, because it may get other tokens once earlier layers are rounded.
    """

    def __init__(self, weights: BlockWeights, entering: Array) -> None:
        self._weights, self._energy = weights, _energy(entering)
        self.inputs: dict[str, Array] = {}
        self.share: dict[str, Array] = {}

    def __call__(self, kind: str, x: Array, rows: NDArray[np.int64] | None) -> Array:
        out = self._weights.product(kind, x)
        if rows is None:
            self.inputs[kind] = x
            self.share[kind] = _energy(out) / self._energy
        return out


def _energy(x: Array) -> Array:
    """Mean square of each token, never 0."""
    return np.asarray(np.maximum(np.einsum("nk,nk->n", x, x) / x.shape[1], np.float32(1e-12)), np.float32)


class _LayerRounder:
    """Rounds the matrices of one block when their inputs are known, and computes the block's products with them."""

    def __init__(
        self, block: Block, weights: BlockWeights, exact: _ExactLayer, leaving: Array, plan: Plan, files: RowFiles
    ) -> None:
        """leaving: the float model's residual stream after the block."""
        self._block, self._weights, self._exact, self._plan, self._files = block, weights, exact, plan, files
        self._leaving = _energy(leaving)
        self.errors: dict[Site, float] = {}

    def __call__(self, kind: str, x: Array, rows: NDArray[np.int64] | None) -> Array:
        linear, matrix = self._block.linear(kind), self._weights.matrices[kind]
        site, blocks = linear.site, self._plan.get(linear.site)
        if blocks is None:
            return self._weights.product(kind, x)
        if not np.isfinite(x).all():
            raise not_finite("the input", site)
        wanted = x if rows is not None else self._exact.inputs[kind]
        rounded = self._rounded(x, wanted, self._token_weight(linear, rows), matrix, blocks)
        self._files.put(site, rounded, blocks)
        out = np.asarray(x @ dequantize_rows(rounded, bits=blocks.bits).T)
        expected = wanted[::_ERROR_STRIDE] @ matrix.T
        lost = np.square(out[::_ERROR_STRIDE] - expected).sum() / max(np.square(expected).sum(), np.float32(1e-30))
        if not np.isfinite(lost):  # a weight that is not finite may round to an integer
            raise not_finite("the output", site)
        self.errors[site] = float(lost)
        return out

    def _rounded(self, x: Array, wanted: Array, token_weight: Array, matrix: Array, blocks: Blocks) -> QuantizedRows:
        """Round the matrix so that its product with x is near the exact product with `wanted`."""
        if blocks.bits == 8:
            return quantize_rows(matrix, bits=8, block_size=blocks.block_size, symmetric=True)
        if matrix.shape[1] > MAX_GPTQ_INPUTS:
            return nearest_rows(matrix, blocks)
        lost = None if wanted is x else drift(matrix, wanted, x, token_weight, shrinkage=SHRINKAGE)
        gram = GramMatrix(matrix.shape[1])
        gram.update(x, token_weight)
        return gptq_blocks(matrix, gram, blocks, lost)

    def _token_weight(self, linear: Linear, rows: NDArray[np.int64] | None) -> Array:
        """Per-token error weights: for layers that write to the residual stream, the squared gain of the next norm,
        times up to _MOST_SPECIAL for tokens whose output is an unusually large part of the stream. 1 for other layers.
        """
        leaving = self._leaving if rows is None else self._leaving[rows]
        if not linear.writes_stream:
            return np.ones(len(leaving), np.float32)
        if rows is not None:
            return np.asarray(1 / leaving, np.float32)
        share = self._exact.share[linear.site.kind]
        special = np.clip(share / max(float(np.median(share)), 1e-12), 1, _MOST_SPECIAL)
        return np.asarray(special / leaving, np.float32)


class _State:
    """The state of a run, in memory and in one file that is replaced after every layer."""

    def __init__(self, file: Path, fingerprint: str, exact: Array, rounded: Array) -> None:
        self._file, self._fingerprint = file, fingerprint
        self.exact, self.rounded = exact, rounded
        self.layers_done = 0
        self.errors: dict[Site, float] = {}

    @classmethod
    def begin(cls, workdir: Path, fingerprint: str, embedded: Array) -> "_State":
        """Continue an interrupted run, or start at the first layer."""
        state = cls(workdir / "rounding.npz", fingerprint, embedded, embedded)
        if state._file.is_file():
            found = load_arrays(state._file)
            progress = json.loads(str(found["progress"]))
            if progress["fingerprint"] == fingerprint:
                state.exact, state.rounded = found["exact"], found["rounded"]
                state.layers_done = progress["layers_done"]
                state.errors = {Site(layer, kind): error for layer, kind, error in progress["errors"]}
        return state

    def finish(self, layer: int, errors: Mapping[Site, float]) -> None:
        """Save a finished layer, whose matrices are already on disk."""
        self.layers_done = layer + 1
        self.errors |= errors
        progress = {
            "fingerprint": self._fingerprint,
            "layers_done": self.layers_done,
            "errors": [(*site, error) for site, error in self.errors.items()],
        }
        save_arrays(
            self._file, {"exact": self.exact, "rounded": self.rounded, "progress": np.array(json.dumps(progress))}
        )


def _fingerprint(checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]], plan: Plan) -> str:
    """A hash of the model, the text and the plan: a run continues only one with the same hash."""
    blocks = {str(site): asdict(chosen) for site, chosen in plan.items()}
    digest = hashlib.sha256(json.dumps([blocks, sequences_digest(sequences)], sort_keys=True).encode())
    digest.update(fingerprint_of(checkpoint, config))
    return digest.hexdigest()
