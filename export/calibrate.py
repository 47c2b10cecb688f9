"""Run the calibration text through the float model once, layer by layer, and keep statistics of every layer's input.

Layer outside, chunks of sequences inside: memory is one layer's weights, one chunk's activations and the statistics,
whatever the number of samples; the hidden states between two layers lie on disk. A finished layer is saved, so an
interrupted run goes on where it stopped. Chooses nothing; see range_search.py.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.activation_stats import Site, SiteStatistics, Statistics
from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.hidden_spool import HiddenSpool
from export.reference import Array, Block, load_block, rms_norm, run_block
from export.rope import RopeTables, rope_tables
from export.smoothing import head_site
from export.statistics_file import load_statistics, save_statistics
from runtime.progress import progress_bar

# Activations held at once. The widest is the stacked gate and up projection, and a few copies of its halves.
CHUNK_BYTES = 256 << 20
_COPIES = 3.0


class Chunk(NamedTuple):
    """Some whole sequences: their numbers, their first and last row, and their edges counted from the first row."""

    sequence_idx: range
    start: int
    stop: int
    edges: np.ndarray[tuple[int], np.dtype[np.int64]]


def collect_statistics(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]], workdir: Path
) -> Statistics:
    """Statistics of every linear layer's input and of the KV cache; CalibrationFailed if something is not finite.

    `workdir` holds the hidden states (two layers of `[tokens, hidden]` float32) and what is finished; a workdir left
    by an interrupted run over the same text and model is continued, any other is started anew.
    """
    chunks = list(chunks_of(sequences, config))
    tables = rope_tables(config.rope, config.head_dim, max(map(len, sequences)))
    run = _Run(checkpoint, config, workdir, _fingerprint(checkpoint, config, sequences))
    num_tokens = sum(map(len, sequences))
    with progress_bar("calibrate", total=num_tokens * config.num_layers, unit="token") as bar:
        bar.update(num_tokens * run.layers_done)
        if run.layers_done == 0:
            run.embed(sequences, chunks)
        for layer in range(run.layers_done, config.num_layers):
            block = load_block(checkpoint, config, layer)
            for chunk in chunks:
                run.chunk(block, layer, chunk, tables)
                bar.update(chunk.stop - chunk.start)
            run.finish(layer)
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
    return int(4 * (2 * config.intermediate_size * _COPIES + 6 * config.hidden_size))


def _chunk(sequences: Sequence[Sequence[int]], first: int, last: int, begin: int) -> Chunk:
    edges = np.cumsum([0, *map(len, sequences[first:last])])
    return Chunk(range(first, last), begin, begin + int(edges[-1]), edges)


class _Run:
    """The state of one calibration, and its copy on disk."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, workdir: Path, fingerprint: str) -> None:
        self.checkpoint, self.config, self.workdir = checkpoint, config, workdir
        self.fingerprint = fingerprint
        self.spool = HiddenSpool(workdir, config.hidden_size)
        self.statistics: Statistics = {}
        self.layers_done = 0
        state = workdir / "state.json"
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            if found["fingerprint"] == fingerprint:
                self.layers_done = found["layers_done"]
                self.statistics = load_statistics(workdir / "statistics.npz")
        workdir.mkdir(parents=True, exist_ok=True)

    def embed(self, sequences: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> None:
        table = self.checkpoint.load("model.embed_tokens.weight")
        for chunk in chunks:
            ids = np.concatenate([np.asarray(sequences[idx], np.int64) for idx in chunk.sequence_idx])
            self.spool.append(0, table[ids], is_first=chunk.start == 0)

    def chunk(self, block: Block, layer: int, chunk: Chunk, tables: RopeTables) -> None:
        """One chunk through one layer."""

        def product(kind: str, x: Array) -> Array:
            self._update(Site(layer, kind), x, chunk)
            return block.product(kind, x)

        num_seen = {"k": 0, "v": 0}

        def observe(kind: str, heads: Array) -> None:
            flat = heads.reshape(len(heads), -1)
            site = Site(layer, kind)
            self._at(site, flat.shape[1]).update(flat, chunk.sequence_idx[num_seen[kind]], site)
            num_seen[kind] += 1

        x = self.spool.read(layer, chunk.start, chunk.stop)
        x = run_block(block, self.config, layer, x, chunk.edges, tables, product=product, observe=observe)
        self.spool.append(layer + 1, x, is_first=chunk.start == 0)
        if layer + 1 == self.config.num_layers:
            norm = self.checkpoint.load("model.norm.weight")
            self._update(head_site(self.config), rms_norm(x, norm, self.config.rms_norm_eps), chunk)

    def finish(self, layer: int) -> None:
        """Put a whole layer on disk; the state last, so that it never names what is not there."""
        self.layers_done = layer + 1
        save_statistics(self.workdir / "statistics.npz", self.statistics)
        state = {"fingerprint": self.fingerprint, "layers_done": self.layers_done}
        partial = self.workdir / "state.json.partial"
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self.workdir / "state.json")

    def _update(self, site: Site, x: Array, chunk: Chunk) -> None:
        statistics = self._at(site, x.shape[1])
        for idx, (start, stop) in zip(chunk.sequence_idx, pairwise(chunk.edges), strict=True):
            statistics.update(x[start:stop], idx, site)

    def _at(self, site: Site, num_channels: int) -> SiteStatistics:
        return self.statistics.setdefault(site, SiteStatistics.empty(num_channels))


def _fingerprint(checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]]) -> str:
    """What a run must share with an interrupted one to go on with it: the text, the dimensions, and some weights."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        digest.update(checkpoint.load(name).tobytes())
    for sequence in sequences:
        digest.update(np.asarray(sequence, np.int64).tobytes() + b"|")
    return digest.hexdigest()
