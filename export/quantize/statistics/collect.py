"""Run the calibration text through the float model once, layer by layer, and keep statistics of every layer's input.

Layer outside, chunks of sequences inside: memory is one layer's weights, some chunks' activations and the statistics,
whatever the number of samples; the hidden states between two layers lie on disk. A finished layer is saved, so an
interrupted run goes on where it stopped. Chooses nothing itself: a `Follower` may, from a few tokens of each layer,
while that layer's weights are at hand; see int8_search.py.
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

from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig, Rotary, Site
from export.model.reference.forward import embedded, load_block, load_norm, load_positions, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights, NormWeights, normed
from export.model.rope import RopeTables
from export.quantize.statistics.activation_stats import SiteStatistics, Statistics
from export.quantize.statistics.parallel import in_order
from export.quantize.statistics.spool import HiddenSpool
from export.quantize.statistics.store import load_statistics, save_statistics
from export.storage.whole_file import write_whole
from runtime.progress import progress_bar

# Activations one worker holds at once: about one sequence of 512 tokens of SmolLM2-135M. More of them take a tenth
# longer, in page faults. The widest is the stacked gate and up projection, and a few copies of its halves.
CHUNK_BYTES = 26 << 20
_COPIES = 3.0

# Tokens of a sequence that searches judge on, its first among them: it is where the massive activations are; and the
# sequences they are taken from.
_TOKENS_A_SEQUENCE = 28
NUM_SAMPLED = 24


Tables = dict[Rotary, RopeTables]
"""cos and sin of every rotary embedding."""


class Chunk(NamedTuple):
    """Some whole sequences: their numbers, their first and last row, and their edges counted from the first row."""

    sequence_idx: range
    start: int
    stop: int
    edges: np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Seen:
    """Some tokens' inputs of one linear layer, float32 `[n, K]`.

    fold: of each token, the number of the sequence it comes from
    residual: mean square of the residual stream behind the block, `[n]`
    """

    inputs: Array
    fold: NDArray[np.int64]
    residual: Array


@dataclass(frozen=True, slots=True)
class LayerSample:
    """Some tokens of one decoder layer (or, by the number of layers, of the LM head).

    seen: by kind of linear layer; an expert saw the tokens that chose it. matrices: by kind, `[N, K]`
    """

    layer: int
    seen: Mapping[str, Seen]
    matrices: Mapping[str, Array]


class Follower(Protocol):
    """Goes along with a calibration, layer by layer. What it found is kept with the run, and given back to it."""

    def follow(self, sample: LayerSample, statistics: Statistics) -> None:
        """A layer's statistics are complete."""
        ...

    def state(self) -> Any:
        """What it found so far, JSON-able."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned in an interrupted run."""
        ...


def collect_statistics(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    workdir: Path,
    follower: Follower | None = None,
) -> Statistics:
    """Statistics of every linear layer's input and of the KV cache; CalibrationFailed if something is not finite.

    `workdir` holds the hidden states (two layers of `[tokens, hidden]` float32) and what is finished; a workdir left
    by an interrupted run over the same text and model is continued, any other is started anew.
    """
    chunks = list(chunks_of(sequences, config))
    tables = rotary_tables(config, max(map(len, sequences)))
    run = _Run(checkpoint, config, workdir, _fingerprint(checkpoint, config, sequences), follower)
    num_tokens = sum(map(len, sequences))
    with progress_bar("calibrate", total=num_tokens * config.num_layers, unit="token") as bar:
        bar.update(num_tokens * run.layers_done)
        if run.layers_done == 0:
            run.embed(sequences, chunks)
        for layer in range(run.layers_done, config.num_layers):
            run.layer(layer, chunks, tables, on_tokens=bar.update)
    return run.statistics


def chunks_of(sequences: Sequence[Sequence[int]], config: ModelConfig, *, limit: int | None = None) -> Iterator[Chunk]:
    """Whole sequences in order, at least one at once, else at most `limit` tokens: as many as CHUNK_BYTES allow."""
    limit = limit or max(1, CHUNK_BYTES // token_bytes(config))
    first, size = 0, 0
    begin = 0
    for idx, sequence in enumerate(sequences):
        if size and size + len(sequence) > limit:
            yield _chunk(sequences, first, idx, begin)
            begin, first, size = begin + size, idx, 0
        size += len(sequence)
    yield _chunk(sequences, first, len(sequences), begin)


def token_bytes(config: ModelConfig) -> int:
    """Bytes of activations a token takes while it passes a layer."""
    widest = max(linear.num_outputs for linear in config.linears if linear.role in ("gate_up", "up"))
    return int(4 * (widest * _COPIES + 6 * config.hidden_size))


def _chunk(sequences: Sequence[Sequence[int]], first: int, last: int, begin: int) -> Chunk:
    edges = np.cumsum([0, *map(len, sequences[first:last])])
    return Chunk(range(first, last), begin, begin + int(edges[-1]), edges)


class _Passed(NamedTuple):
    """What one chunk leaves: its hidden states, its share of the statistics, and its share of the samples."""

    hidden: Array
    statistics: Statistics
    seen: dict[str, Seen]


class _Run:
    """The state of one calibration, and its copy on disk."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, workdir: Path, fingerprint: str, follower: Follower | None
    ) -> None:
        self.checkpoint, self.config, self.workdir, self.follower = checkpoint, config, workdir, follower
        self.fingerprint = fingerprint
        self.spool = HiddenSpool(workdir, config.hidden_size)
        self.statistics: Statistics = {}
        self.layers_done = 0
        state = workdir / "state.json"
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            # Whoever follows needs every layer: a run that nobody followed is no beginning.
            if found["fingerprint"] == fingerprint and (follower is None or found.get("follower") is not None):
                self.layers_done = found["layers_done"]
                self.statistics = load_statistics(workdir / "statistics.npz")
                if follower is not None:
                    follower.restore(found["follower"])
        workdir.mkdir(parents=True, exist_ok=True)

    def embed(self, sequences: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> None:
        embedding = self.config.embedding
        table, positions = self.checkpoint.load(f"{embedding.name}.weight"), load_positions(self.checkpoint, embedding)
        for chunk in chunks:
            x = embedded(table, positions, embedding, [sequences[idx] for idx in chunk.sequence_idx])
            self.spool.append(0, x, is_first=chunk.start == 0)

    def layer(self, layer: int, chunks: Sequence[Chunk], tables: Tables, *, on_tokens: Any) -> None:
        """All chunks through one layer; then its follower, and the disk: the state last, so that it never names what
        is not there."""
        block = load_block(self.checkpoint, self.config.blocks[layer])
        is_last = layer + 1 == self.config.num_layers
        norm = load_norm(self.checkpoint, self.config.final_norm) if is_last else None
        samples: dict[str, list[Seen]] = {}
        for chunk, passed in zip(
            chunks, in_order(lambda chunk: self._chunk(block, layer, chunk, tables, norm), chunks), strict=True
        ):
            self.spool.append(layer + 1, passed.hidden, is_first=chunk.start == 0)
            for site, part in passed.statistics.items():
                self.statistics.setdefault(site, SiteStatistics.empty(part.absmax.shape[1])).merge(part)
            for kind, seen in passed.seen.items():
                samples.setdefault(kind, []).append(seen)
            on_tokens(chunk.stop - chunk.start)
        if self.follower is not None:
            self._follow(self.follower, layer, block, {kind: _joined(parts) for kind, parts in samples.items()})
        self.layers_done = layer + 1
        save_statistics(self.workdir / "statistics.npz", self.statistics)
        state = {
            "fingerprint": self.fingerprint,
            "layers_done": self.layers_done,
            "follower": self.follower and self.follower.state(),
        }
        write_whole(self.workdir / "state.json", json.dumps(state).encode())

    def _chunk(
        self, weights: BlockWeights, layer: int, chunk: Chunk, tables: Tables, norm: NormWeights | None
    ) -> _Passed:
        """One chunk through one layer; `norm`: the final norm behind the last one."""
        statistics: Statistics = {}
        inputs: dict[str, tuple[Array, NDArray[np.int64] | None]] = {}
        sampled, fold = _sampled_rows(chunk)

        def update(site: Site, x: Array, rows: NDArray[np.int64] | None) -> None:
            entry = statistics.setdefault(site, SiteStatistics.empty(x.shape[1]))
            edges = chunk.edges if rows is None else np.searchsorted(rows, chunk.edges)
            for idx, (start, stop) in zip(chunk.sequence_idx, pairwise(edges), strict=True):
                if stop > start:
                    entry.update(x[start:stop], idx, site)
            if rows is None:
                inputs[site.kind] = x[sampled], None
            elif (chosen := np.isin(rows, sampled)).any():
                inputs[site.kind] = x[chosen], np.searchsorted(sampled, rows[chosen])

        def product(kind: str, x: Array, rows: NDArray[np.int64] | None) -> Array:
            update(Site(layer, kind), x, rows)
            return weights.product(kind, x)

        num_seen = {"k": 0, "v": 0}

        def observe(kind: str, heads: Array) -> None:
            flat = heads.reshape(len(heads), -1)
            site = Site(layer, kind)
            entry = statistics.setdefault(site, SiteStatistics.empty(flat.shape[1]))
            entry.update(flat, chunk.sequence_idx[num_seen[kind]], site)
            num_seen[kind] += 1

        x = self.spool.read(layer, chunk.start, chunk.stop)
        x = run_block(weights, self.config.blocks[layer], x, chunk.edges, tables, product=product, observe=observe)
        if norm is not None:
            update(self.config.head.linear.site, normed(x, norm, self.config.final_norm), None)
        residual = np.square(x[sampled]).mean(1)
        seen = {
            kind: Seen(some, fold, residual) if which is None else Seen(some, fold[which], residual[which])
            for kind, (some, which) in inputs.items()
            if len(sampled)
        }
        return _Passed(x, statistics, seen)

    def _follow(self, follower: Follower, layer: int, weights: BlockWeights, seen: dict[str, Seen]) -> None:
        head = self.config.head.linear
        last = {head.site.kind: seen.pop(head.site.kind)} if head.site.kind in seen else {}
        follower.follow(LayerSample(layer, seen, weights.matrices), self.statistics)
        if last:
            matrix = {head.site.kind: self.checkpoint.load(head.weight_names[0])}
            follower.follow(LayerSample(head.site.layer, last, matrix), self.statistics)


def _joined(parts: Sequence[Seen]) -> Seen:
    """What several chunks saw, end to end."""
    inputs, fold, residual = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("inputs", "fold", "residual")
    )
    return Seen(inputs, fold, residual)


def _sampled_rows(chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a chunk that go into samples, and the sequence of each: some of the first sequences' tokens."""
    rows, fold = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for idx, (start, stop) in zip(chunk.sequence_idx, pairwise(chunk.edges), strict=True):
        if idx < NUM_SAMPLED:
            rows.append(np.unique(np.linspace(start, stop - 1, _TOKENS_A_SEQUENCE).astype(np.int64)))
            fold.append(np.full(len(rows[-1]), idx))
    return np.concatenate(rows), np.concatenate(fold)


def _fingerprint(checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]]) -> str:
    """What a run must share with an interrupted one to go on with it: the text, the dimensions, and some weights."""
    digest = hashlib.sha256(fingerprint_of(checkpoint, config))
    for sequence in sequences:
        digest.update(np.asarray(sequence, np.int64).tobytes() + b"|")
    return digest.hexdigest()


def fingerprint_of(checkpoint: Checkpoint, config: ModelConfig) -> bytes:
    """What tells one model from another: its description, and a matrix of its first and of its last block."""
    digest = hashlib.sha256(repr(config).encode())
    for block in (config.blocks[0], config.blocks[-1]):
        digest.update(checkpoint.load(block.attention.qkv.weight_names[1]).tobytes())
    return digest.digest()
