"""From statistics to a plan: for every linear layer a smoothing vector and an int8 range, and its weights rounded.

Two passes over a few sequences: one to choose the ranges, one, over the smoothed model, to round the weights against
the very inputs the int8 product will see. Which layers get two int8 passes is sensitivity.py's choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.activation_stats import Site, Statistics
from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.error_compensation import MAX_COMPENSATED, Moments
from export.int8_rounding import Int8Rows, error_compensated, rounded_activations, rounded_to_nearest
from export.range_search import Range, search_range
from export.reference import PROJECTIONS
from export.search_pass import SearchPass
from export.smoothing import LM_HEAD, SmoothedCheckpoint, smoothing_vector
from runtime.progress import progress_bar

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SiteRanges:
    """What the search found for one site: one int8 pass, or two."""

    narrow: Range
    wide: Range


def search_ranges(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[Sequence[int]], statistics: Statistics
) -> dict[Site, SiteRanges]:
    """Ranges of every linear layer's input, the LM head's included."""
    found: dict[Site, SiteRanges] = {}
    search = SearchPass(checkpoint, config, sequences)
    with progress_bar("search", total=config.num_layers + 1) as bar:
        for layer in search:
            for kind, inputs in layer.inputs.items():
                site = Site(layer.layer, kind)
                sample = search.sample(inputs, layer.token_weight[kind])
                absmax, matrix = statistics[site].absmax, layer.matrices[kind]
                found[site] = SiteRanges(
                    search_range(site, sample, absmax, matrix, config, is_wide=False),
                    search_range(site, sample, absmax, matrix, config, is_wide=True),
                )
            bar.update(1)
    return found


def smoothing_vectors(
    checkpoint: Checkpoint, config: ModelConfig, statistics: Statistics, ranges: Mapping[Site, Range]
) -> dict[Site, Array]:
    """Each site's vector at its strength, from the maxima of all folds."""
    vectors = {}
    for site, chosen in ranges.items():
        highest = weight_highest(checkpoint, config, site)
        vectors[site] = smoothing_vector(statistics[site].highest, highest, chosen.strength, site=site, config=config)
    return vectors


def weight_highest(checkpoint: Checkpoint, config: ModelConfig, site: Site) -> Array:
    """Largest magnitude of each column of a site's stacked matrix."""
    columns = [np.abs(checkpoint.load(name)).max(0) for name in weight_names(config, site)]
    return np.asarray(np.max(columns, axis=0), np.float32)


def weight_names(config: ModelConfig, site: Site) -> list[str]:
    """The checkpoint's tensors that a site's matrix stacks."""
    if site.kind == LM_HEAD:
        return ["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return [f"model.layers.{site.layer}.{name}.weight" for name in PROJECTIONS[site.kind]]


def layer_name(site: Site) -> str:
    """What graphs call the layer: its first projection, without `.weight`."""
    return LM_HEAD if site.kind == LM_HEAD else f"model.layers.{site.layer}.{PROJECTIONS[site.kind][0]}"


class RoundedWeights:
    """int8 weights of every site, each in a file of its own: a model larger than memory can be rounded."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, site: Site, rows: Int8Rows) -> None:
        np.savez(self._file(site), values=rows.values, scales=rows.scales)

    def get(self, site: Site) -> Int8Rows:
        with np.load(self._file(site)) as loaded:
            return Int8Rows(loaded["values"], loaded["scales"])

    def _file(self, site: Site) -> Path:
        return self._directory / f"{site}.npz"


def round_weights(
    smoothed: SmoothedCheckpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    ranges: Mapping[Site, Range],
    rounded: RoundedWeights,
) -> None:
    """Round the smoothed weights of every site of `ranges`; `config` is that of the smoothed checkpoint."""
    search = SearchPass(smoothed, config, sequences)
    with progress_bar("round", total=config.num_layers + 1) as bar:
        for layer in search:
            for kind, inputs in layer.inputs.items():
                site = Site(layer.layer, kind)
                chosen, matrix = ranges[site], layer.matrices[kind]
                if matrix.shape[1] > MAX_COMPENSATED:
                    rounded.put(site, rounded_to_nearest(matrix))
                    continue
                moments = Moments(matrix.shape[1])
                seen = rounded_activations(inputs, chosen.scale, chosen.fine_scale)
                moments.update(inputs, seen, layer.token_weight[kind])
                rounded.put(site, error_compensated(matrix, moments))
            bar.update(1)
