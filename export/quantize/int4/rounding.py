"""Round a model's linear layers to int4 blocks, one after another, each for the inputs it will really get.

Two streams of hidden states go through the layers side by side: the float model's, and that of the model whose earlier
layers are rounded already. What a layer is rounded against is the second stream's input, and what it should give is
what the float layer gives for the first one's: errors made before are taken back where the weights can (GPTAQ,
arXiv:2504.02692). A finished layer is saved, so an interrupted run goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.calibration.dataset import sequences_digest
from export.checkpoint.protocol import Checkpoint
from export.model.description import Block, Linear, ModelConfig, Site
from export.model.reference.forward import embed, load_block, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights
from export.quantize.int4.row_files import RowFiles
from export.quantize.rounding.blocks import compensated_rows, nearest_rows
from export.quantize.rounding.gptq import MAX_COMPENSATED, Moments
from export.quantize.statistics.collect import fingerprint_of, token_bytes
from export.quantize.statistics.store import load_arrays, save_arrays
from export.schemes.forms import Blocks
from export.storage.blocks import QuantizedRows, dequantize_rows, quantize_rows
from runtime.errors import CalibrationFailed
from runtime.progress import progress_bar

PIECE = 128
"""Tokens of a piece of calibration text: short ones, because each has a first token, where the massive activations
are."""

NUM_PIECES = 96
"""Pieces at most: 12,000 tokens are eight for each channel of SmolLM2-135M's widest layer."""

_MOST_SPECIAL = 100.0
"""What a token counts at most beside others. A layer that makes a massive activation does so at a piece's first token
alone, and every later layer and token sees what came of it: in SmolLM2-135M's layer 11, rounding down to nearest costs
KL 0.038 nats, GPTQ with all tokens alike 0.009, with the first one 10, 100, 1,000, 20,000 times as heavy 0.007, 0.0041,
0.0033, 0.0050. In layers that add little at their first token, more weight there only harms."""

# Activations of all pieces are held at once, those of a layer's four inputs twice.
MOST_BYTES = 1 << 30

_ERROR_STRIDE = 16  # tokens whose output errors are looked at, for the account alone


class LayerError(NamedTuple):
    """A site's output error on the calibration text, mean square, relative to the exact output's."""

    site: Site
    error: float


Plan = Mapping[Site, Blocks]
"""The blocks of every site that is rounded; the others are left to the graph."""

Put = Callable[[Site, QuantizedRows, Blocks], object]
"""Keeps a site's rounded matrix."""


def round_layers(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]], plan: Plan, workdir: Path
) -> tuple[RowFiles, list[LayerError]]:
    """Round all sites of the plan into `workdir`, and say what each lost. CalibrationFailed if an input is not finite.

    A workdir left by an interrupted run over the same text, model and plan is continued, any other started anew.
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
            rounder = _LayerRounder(block, weights, exact, state.exact, plan, files.put)
            state.rounded = run_block(weights, block, state.rounded, edges, tables, product=rounder)
            state.finish(block.layer, rounder.errors)
            bar.update(1)
    return files, state.errors


def pieces_of(sequences: Sequence[Sequence[int]], config: ModelConfig) -> list[Sequence[int]]:
    """Pieces to round on, out of as many sequences as there are, each a little further from its beginning.

    Fewer where the model is so wide that their activations would not fit; see token_bytes.
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
    """The products of one layer in float32; keeps their inputs, and how much each token's outputs are beside the
    residual stream that enters the layer.

    Of an expert nothing is kept: rounding earlier layers may send it other tokens.
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
    """The products of one layer, its matrices rounded as their inputs come by."""

    def __init__(
        self, block: Block, weights: BlockWeights, exact: _ExactLayer, behind: Array, plan: Plan, put: Put
    ) -> None:
        self._block, self._weights, self._exact, self._plan, self._put = block, weights, exact, plan, put
        self._behind = _energy(behind)
        self.errors: list[LayerError] = []

    def __call__(self, kind: str, x: Array, rows: NDArray[np.int64] | None) -> Array:
        linear, matrix = self._block.linear(kind), self._weights.matrices[kind]
        site, blocks = linear.site, self._plan.get(linear.site)
        if blocks is None:
            return self._weights.product(kind, x)
        if not np.isfinite(x).all():
            raise _not_finite("input", site)
        wanted = x if rows is not None else self._exact.inputs[kind]
        rounded = self._rounded(x, wanted, self._token_weight(linear, rows), matrix, blocks)
        self._put(site, rounded, blocks)
        out = np.asarray(x @ dequantize_rows(rounded, bits=blocks.bits).T)
        expected = wanted[::_ERROR_STRIDE] @ matrix.T
        lost = np.square(out[::_ERROR_STRIDE] - expected).sum() / max(np.square(expected).sum(), np.float32(1e-30))
        if not np.isfinite(lost):  # a weight that is not finite rounds to something that is
            raise _not_finite("output", site)
        self.errors.append(LayerError(site, float(lost)))
        return out

    def _rounded(self, x: Array, wanted: Array, token_weight: Array, matrix: Array, blocks: Blocks) -> QuantizedRows:
        """The matrix for inputs x, so that its product is near the exact one of the inputs `wanted`."""
        if blocks.bits == 8:
            return quantize_rows(matrix, bits=8, block_size=blocks.block_size, symmetric=True)
        if matrix.shape[1] > MAX_COMPENSATED:
            return nearest_rows(matrix, blocks)
        moments = Moments(matrix.shape[1], aims_at_exact=True)
        moments.update(wanted, x, token_weight)
        return compensated_rows(matrix, moments, blocks)

    def _token_weight(self, linear: Linear, rows: NDArray[np.int64] | None) -> Array:
        """Per-token error weights. A layer that writes to the residual stream is weighted by the gain of the next norm,
        and tokens whose output is an uncommonly large part of the stream count more, see _MOST_SPECIAL.
        """
        behind = self._behind if rows is None else self._behind[rows]
        if not linear.writes_stream:
            return np.ones(len(behind), np.float32)
        if rows is not None:
            return np.asarray(1 / behind, np.float32)
        share = self._exact.share[linear.site.kind]
        special = np.clip(share / max(float(np.median(share)), 1e-12), 1, _MOST_SPECIAL)
        return np.asarray(special / behind, np.float32)


def _not_finite(what: str, site: Site) -> CalibrationFailed:
    return CalibrationFailed(
        f"the {what} of {site} is not finite on the calibration text: the checkpoint is broken, or float32 too narrow "
        "for it"
    )


class _State:
    """How far a run is, and its copy on disk: one file, replaced as a whole after every layer."""

    def __init__(self, file: Path, fingerprint: str, exact: Array, rounded: Array) -> None:
        self._file, self._fingerprint = file, fingerprint
        self.exact, self.rounded = exact, rounded
        self.layers_done = 0
        self.errors: list[LayerError] = []

    @classmethod
    def begin(cls, workdir: Path, fingerprint: str, embedded: Array) -> "_State":
        """Where an interrupted run stopped, or the first layer."""
        state = cls(workdir / "rounding.npz", fingerprint, embedded, embedded)
        if state._file.is_file():
            found = load_arrays(state._file)
            account = json.loads(str(found["account"]))
            if account["fingerprint"] == fingerprint:
                state.exact, state.rounded = found["exact"], found["rounded"]
                state.layers_done = account["layers_done"]
                state.errors = [LayerError(Site(layer, kind), error) for layer, kind, error in account["errors"]]
        return state

    def finish(self, layer: int, errors: Sequence[LayerError]) -> None:
        """Put a whole layer on disk; its matrices are there already."""
        self.layers_done = layer + 1
        self.errors += errors
        account = {
            "fingerprint": self._fingerprint,
            "layers_done": self.layers_done,
            "errors": [(*entry.site, entry.error) for entry in self.errors],
        }
        save_arrays(
            self._file, {"exact": self.exact, "rounded": self.rounded, "account": np.array(json.dumps(account))}
        )


def _fingerprint(checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]], plan: Plan) -> str:
    """What a run must share with an interrupted one to go on with it."""
    blocks = {str(site): asdict(chosen) for site, chosen in plan.items()}
    digest = hashlib.sha256(json.dumps([blocks, sequences_digest(sequences)], sort_keys=True).encode())
    digest.update(fingerprint_of(checkpoint, config))
    return digest.hexdigest()
