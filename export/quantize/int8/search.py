"""From statistics to a plan: for every linear layer a smoothing vector and an int8 range, and its weights rounded.

The ranges are chosen while calibration goes through the layers; a second pass, of a few sequences through the smoothed
model, rounds the weights against the very inputs the int8 product will see. Which layers get two int8 passes is
sensitivity.py's choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig, Site
from export.quantize.int8.ranges import Range, Sample, search_range
from export.quantize.int8.smoothquant import SmoothedCheckpoint, smoothing_vector
from export.quantize.rounding.gptq import MAX_COMPENSATED, Moments
from export.quantize.rounding.int8 import Int8Rows, error_compensated, rounded_activations, rounded_to_nearest
from export.quantize.statistics.activation_stats import Statistics
from export.quantize.statistics.collect import LayerSample
from export.quantize.statistics.parallel import in_order
from export.quantize.statistics.search_pass import LayerInputs, SearchPass
from runtime.progress import progress_bar

Array = NDArray[np.float32]

# Inputs up to which the layers of a block are rounded side by side; wider ones keep all cores busy by themselves.
MAX_SIDE_BY_SIDE = 2048


@dataclass(frozen=True, slots=True)
class SiteRanges:
    """What the search found for one site: one int8 pass, or two."""

    narrow: Range
    wide: Range


class RangeSearch:
    """Finds the ranges of every linear layer's input, the LM head's included, while calibration runs (a `Follower`)."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.ranges: dict[Site, SiteRanges] = {}

    def follow(self, sample: LayerSample, statistics: Statistics) -> None:
        """Search one layer's sites, each kind on a core of its own."""

        def search(kind: str) -> SiteRanges:
            site, matrix, seen = Site(sample.layer, kind), sample.matrices[kind], sample.seen[kind]
            residual = seen.residual if self._config.by_site[site].writes_stream else None
            some, absmax = Sample(seen.inputs, seen.fold, residual), statistics[site].absmax
            return SiteRanges(
                search_range(site, some, absmax, matrix, self._config, is_wide=False),
                search_range(site, some, absmax, matrix, self._config, is_wide=True),
            )

        kinds = [kind for kind in sample.seen if self._config.by_site[Site(sample.layer, kind)].is_quantizable]
        for kind, found in zip(kinds, in_order(search, kinds), strict=True):
            self.ranges[Site(sample.layer, kind)] = found

    def state(self) -> list[Any]:
        return ranges_to_json(self.ranges)

    def restore(self, state: list[Any]) -> None:
        self.ranges = ranges_from_json(state)


def ranges_to_json(ranges: Mapping[Site, SiteRanges]) -> list[Any]:
    """One object a site."""
    return [
        {"layer": site.layer, "kind": site.kind, "narrow": found.narrow._asdict(), "wide": found.wide._asdict()}
        for site, found in ranges.items()
    ]


def ranges_from_json(items: Sequence[Any]) -> dict[Site, SiteRanges]:
    """What `ranges_to_json` returned, more keys or not; KeyError or TypeError if it is damaged."""
    return {
        Site(item["layer"], item["kind"]): SiteRanges(Range(**item["narrow"]), Range(**item["wide"])) for item in items
    }


def smoothing_vectors(
    checkpoint: Checkpoint, config: ModelConfig, statistics: Statistics, ranges: Mapping[Site, Range]
) -> dict[Site, Array]:
    """Each site's vector at its strength, from the maxima of all folds."""

    def vector(site: Site) -> Array:
        highest, strength = weight_highest(checkpoint, config, site), ranges[site].strength
        return smoothing_vector(statistics[site].highest, highest, strength, site=site, config=config)

    return dict(zip(ranges, in_order(vector, ranges), strict=True))


def weight_highest(checkpoint: Checkpoint, config: ModelConfig, site: Site) -> Array:
    """Largest magnitude of each column of a site's stacked matrix."""
    columns = [np.abs(checkpoint.load(name)).max(0) for name in config.by_site[site].weight_names]
    return np.asarray(np.max(columns, axis=0), np.float32)


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
            found = [kind for kind in layer.matrices if Site(layer.layer, kind) in ranges]
            inputs = {kind: layer.inputs[kind] for kind in found if kind in layer.inputs}
            for kind in set(found) - set(inputs):  # an expert that these sequences do not reach
                rounded.put(Site(layer.layer, kind), rounded_to_nearest(layer.matrices[kind]))

            def rounded_rows(kind: str, layer: LayerInputs = layer) -> Int8Rows:
                return _rounded(layer.inputs[kind], layer.matrices[kind], layer.token_weight[kind],
                                ranges[Site(layer.layer, kind)])  # fmt: skip

            # The longest first, so that the cores end together.
            kinds = sorted(inputs, key=layer.num_inputs, reverse=True)
            is_small = layer.matrices[kinds[0]].shape[1] <= MAX_SIDE_BY_SIDE
            for kind, rows in zip(kinds, (in_order if is_small else map)(rounded_rows, kinds), strict=True):
                rounded.put(Site(layer.layer, kind), rows)
            bar.update(1)


def _rounded(inputs: Array, matrix: Array, token_weight: Array, chosen: Range) -> Int8Rows:
    """One site's weights; inputs `[tokens, K]` smoothed, matrix `[N, K]`."""
    if matrix.shape[1] > MAX_COMPENSATED:
        return rounded_to_nearest(matrix)
    # Aiming at the exact input's product as well fits the calibration text, not the next: on SmolLM2-135M, 4,608 tokens
    # held out, KL 0.0043 against 0.0039.
    moments = Moments(matrix.shape[1], aims_at_exact=False)
    moments.update(inputs, rounded_activations(inputs, chosen.scale, chosen.fine_scale), token_weight)
    return error_compensated(matrix, moments)
