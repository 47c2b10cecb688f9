"""Run the calibration text through the float model once, layer by layer, and keep statistics of every layer's input.

The outer loop runs over layers, the inner one over chunks of sequences. Memory holds one layer's weights, some chunks'
activations and the statistics, whatever the number of samples; hidden states between two layers are on disk. Each
finished layer is saved, so an interrupted run continues there. A `LayerObserver` gets some tokens and the weights of
each layer while they are in memory (int8/search.py and int8/sensitivity.py have one each).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from export.calibration.dataset import sequences_digest
from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig, Rotary, Site
from export.model.reference.forward import load_block, load_norm, load_vocabulary, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights, NormWeights, normed
from export.model.rope import RopeTables
from export.quantize.statistics.activation_stats import SiteStatistics, Statistics
from export.quantize.statistics.parallel import in_order
from export.quantize.statistics.spool import HiddenSpool
from export.quantize.statistics.store import load_arrays, save_arrays, statistics_from_arrays, statistics_to_arrays
from export.storage.whole_file import write_whole
from runtime.machine.progress import progress_bar

# Activations that one worker holds: about 512 tokens of SmolLM2-135M. With more, page faults cost a tenth of the time.
# The largest activation is that of the stacked gate and up projection; there are a few copies of its halves.
CHUNK_BYTES = 26 << 20
_COPIES = 3.0

# Observers get this many tokens of each of the first sequences. The first token of a sequence is one of them, because
# it has the massive activations.
_TOKENS_A_SEQUENCE = 28
_NUM_SAMPLED = 24

Tables = dict[Rotary, RopeTables]
"""cos and sin of every rotary embedding."""


class Chunk(NamedTuple):
    """Some whole sequences: their numbers, rows `start` to `stop`, and where each begins, counted from `start`."""

    sequence_idx: range
    start: int
    stop: int
    edges: np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs of one linear layer for some tokens, float32 `[n, K]`.

    fold: the number of each token's sequence, `[n]`
    residual: mean square of the residual stream after the block, `[n]`; the next norm divides by its root
    """

    inputs: Array
    fold: NDArray[np.int64]
    residual: Array


@dataclass(frozen=True, slots=True)
class LayerSample:
    """Some tokens of one decoder layer, or of the LM head, whose `layer` is the number of decoder layers.

    seen: by kind of linear layer; for an expert, tokens that chose it
    """

    layer: int
    seen: Mapping[str, Seen]
    weights: BlockWeights


class LayerObserver(Protocol):
    """Observes a calibration run. Its state is saved with the run."""

    def observe(self, sample: LayerSample, statistics: Statistics) -> None:
        """Called for each layer when its statistics are complete, and for the LM head last."""
        ...

    def state(self) -> Any:
        """The results so far, JSON-able."""
        ...

    def restore(self, state: Any) -> None:
        """Continue from the `state` of an interrupted run."""
        ...


def collect_statistics(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    workdir: Path,
    observers: Sequence[LayerObserver] = (),
) -> Statistics:
    """Collect statistics of every linear layer's input and of the KV cache; CalibrationFailed if one is not finite.

    `workdir` holds hidden states (two layers of float32 `[tokens, hidden]`) and finished layers. A run over the same
    text and model that was interrupted in `workdir` is continued.
    """
    chunks = list(chunks_of(sequences, config))
    tables = rotary_tables(config, max(map(len, sequences)))
    digest = hashlib.sha256(fingerprint_of(checkpoint, config) + sequences_digest(sequences).encode())
    run = _Run(checkpoint, config, workdir, digest.hexdigest(), observers)
    num_tokens = sum(map(len, sequences))
    with progress_bar("calibrate", total=num_tokens * config.num_layers, unit="token") as bar:
        bar.update(num_tokens * run.layers_done)
        if run.layers_done == 0:
            run.embed(sequences, chunks)
        for layer in range(run.layers_done, config.num_layers):
            run.layer(layer, chunks, tables, on_tokens=bar.update)
    return run.statistics


def chunks_of(sequences: Sequence[Sequence[int]], config: ModelConfig, *, limit: int | None = None) -> Iterator[Chunk]:
    """Cut into chunks of whole sequences, at most `limit` tokens (default: CHUNK_BYTES) but at least one sequence."""
    limit = limit or max(1, CHUNK_BYTES // token_bytes(config))
    first, begin, size = 0, 0, 0
    for idx, sequence in enumerate(sequences):
        if size and size + len(sequence) > limit:
            yield _chunk(sequences, first, idx, begin)
            begin, first, size = begin + size, idx, 0
        size += len(sequence)
    yield _chunk(sequences, first, len(sequences), begin)


def token_bytes(config: ModelConfig) -> int:
    """Bytes of activations per token in one layer."""
    widest = max(linear.num_outputs for linear in config.linears if linear.role in ("gate_up", "up", "mix_in"))
    return int(4 * (widest * _COPIES + 6 * config.hidden_size))


def _chunk(sequences: Sequence[Sequence[int]], first: int, last: int, begin: int) -> Chunk:
    edges = np.cumsum([0, *map(len, sequences[first:last])])
    return Chunk(range(first, last), begin, begin + int(edges[-1]), edges)


class _ChunkResult(NamedTuple):
    """One chunk's hidden states after a layer, its statistics and its sampled tokens."""

    hidden: Array
    statistics: Statistics
    seen: dict[str, Seen]


class _Run:
    """The state of one calibration run, in memory and on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        workdir: Path,
        fingerprint: str,
        observers: Sequence[LayerObserver],
    ) -> None:
        self.checkpoint, self.config, self.workdir, self.observers = checkpoint, config, workdir, observers
        self.fingerprint = fingerprint
        self.spool = HiddenSpool(workdir, config.hidden_size)
        self.statistics: Statistics = {}
        self.layers_done = 0
        state = workdir / "state.json"
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            # An observer needs every layer, so it cannot continue a run without one.
            if found["fingerprint"] == fingerprint and len(found.get("observers", [])) >= len(observers):
                self.layers_done = found["layers_done"]
                file = workdir / "statistics.npz"
                self.statistics = statistics_from_arrays(load_arrays(file), file)
                for observer, state_of_it in zip(observers, found["observers"], strict=False):
                    observer.restore(state_of_it)

    def embed(self, sequences: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> None:
        vocabulary = load_vocabulary(self.checkpoint, self.config.embedding, sequences)
        for chunk in chunks:
            x = vocabulary.embed([sequences[idx] for idx in chunk.sequence_idx])
            self.spool.append(0, x, is_first=chunk.start == 0)

    def layer(self, layer: int, chunks: Sequence[Chunk], tables: Tables, *, on_tokens: Any) -> None:
        """Run all chunks through one layer, call the observers, and save. The state is saved last: it names only layers
        whose files are complete."""
        block = load_block(self.checkpoint, self.config.blocks[layer])
        is_last = layer + 1 == self.config.num_layers
        norm = load_norm(self.checkpoint, self.config.final_norm) if is_last else None
        samples: dict[str, list[Seen]] = {}
        for chunk, result in zip(
            chunks, in_order(lambda chunk: self._chunk(block, layer, chunk, tables, norm), chunks), strict=True
        ):
            self.spool.append(layer + 1, result.hidden, is_first=chunk.start == 0)
            for site, part in result.statistics.items():
                self.statistics.setdefault(site, SiteStatistics.empty(part.absmax.shape[1])).merge(part)
            for kind, seen in result.seen.items():
                found = samples.setdefault(kind, [])
                # Of the sequences that observers get nothing of, only what an expert still lacks.
                lacks = sum(len(part.fold) for part in found) < _TOKENS_A_SEQUENCE
                if lacks or chunk.sequence_idx.start < _NUM_SAMPLED:
                    found.append(seen)
            on_tokens(chunk.stop - chunk.start)
        if self.observers:
            self._observe(layer, block, {kind: _joined(parts) for kind, parts in samples.items()})
        self.layers_done = layer + 1
        save_arrays(self.workdir / "statistics.npz", statistics_to_arrays(self.statistics))
        state = {
            "fingerprint": self.fingerprint,
            "layers_done": self.layers_done,
            "observers": [observer.state() for observer in self.observers],
        }
        write_whole(self.workdir / "state.json", json.dumps(state).encode())

    def _chunk(
        self, weights: BlockWeights, layer: int, chunk: Chunk, tables: Tables, norm: NormWeights | None
    ) -> _ChunkResult:
        """Run one chunk through one layer; `norm` is the final norm if the layer is the last."""
        statistics: Statistics = {}
        inputs: dict[str, tuple[Array, NDArray[np.int64]]] = {}
        sampled = _sampled_rows(chunk)

        def update(site: Site, x: Array, rows: NDArray[np.int64] | None) -> None:
            entry = statistics.setdefault(site, SiteStatistics.empty(x.shape[1]))
            edges = chunk.edges if rows is None else np.searchsorted(rows, chunk.edges)
            for idx, (start, stop) in zip(chunk.sequence_idx, pairwise(edges), strict=True):
                if stop > start:
                    entry.update(x[start:stop], idx, site)
            if rows is None:
                inputs[site.kind] = x[sampled], sampled
            else:  # an expert whose tokens are not among the samples gets its first one, so that text never misses it
                chosen = np.flatnonzero(np.isin(rows, sampled))
                chosen = chosen if len(chosen) else np.arange(min(1, len(rows)))
                inputs[site.kind] = x[chosen], rows[chosen]

        def product(kind: str, x: Array, rows: NDArray[np.int64] | None) -> Array:
            update(Site(layer, kind), x, rows)
            return weights.product(kind, x)

        num_seen = {"k": 0, "v": 0}

        def observe_kv(kind: str, heads: Array) -> None:
            flat = heads.reshape(len(heads), -1)
            site = Site(layer, kind)
            entry = statistics.setdefault(site, SiteStatistics.empty(flat.shape[1]))
            entry.update(flat, chunk.sequence_idx[num_seen[kind]], site)
            num_seen[kind] += 1

        x = self.spool.read(layer, chunk.start, chunk.stop)
        x = run_block(weights, self.config.blocks[layer], x, chunk.edges, tables, product=product, observe=observe_kv)
        if norm is not None:
            update(self.config.head.linear.site, normed(x, norm, self.config.final_norm), None)
        seen = {
            kind: Seen(some, _sequences_of(chunk, rows), np.square(x[rows]).mean(1))
            for kind, (some, rows) in inputs.items()
            if len(rows)
        }
        return _ChunkResult(x, statistics, seen)

    def _observe(self, layer: int, weights: BlockWeights, seen: dict[str, Seen]) -> None:
        head = self.config.head.linear
        last = {head.site.kind: seen.pop(head.site.kind)} if head.site.kind in seen else {}
        samples = [LayerSample(layer, seen, weights)]
        if layer + 1 == self.config.num_layers:
            matrix = {head.site.kind: self.checkpoint.load(head.weight_names[0])}
            samples.append(LayerSample(head.site.layer, last, BlockWeights(matrix, {}, {})))
        for sample in samples:
            for observer in self.observers:
                observer.observe(sample, self.statistics)


def _joined(parts: Sequence[Seen]) -> Seen:
    """Concatenate the samples of several chunks."""
    inputs, fold, residual = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("inputs", "fold", "residual")
    )
    return Seen(inputs, fold, residual)


def _sampled_rows(chunk: Chunk) -> NDArray[np.int64]:
    """The rows of a chunk that observers get."""
    rows = [np.zeros(0, np.int64)]
    for idx, (start, stop) in zip(chunk.sequence_idx, pairwise(chunk.edges), strict=True):
        if idx < _NUM_SAMPLED:
            rows.append(np.unique(np.linspace(start, stop - 1, _TOKENS_A_SEQUENCE).astype(np.int64)))
    return np.concatenate(rows)


def _sequences_of(chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each row's sequence."""
    return np.asarray(chunk.sequence_idx.start + np.searchsorted(chunk.edges, rows, side="right") - 1, np.int64)


def fingerprint_of(checkpoint: Checkpoint, config: ModelConfig) -> bytes:
    """A hash of a model's description, and of one matrix each of its first and last block."""
    digest = hashlib.sha256(repr(config).encode())
    for block in (config.blocks[0], config.blocks[-1]):
        digest.update(checkpoint.load(block.mixer.linears[0].weight_names[-1]).tobytes())
    return digest.digest()
