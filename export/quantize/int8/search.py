"""Search the int8 range of every linear layer's input during calibration, and round the weights afterwards.

A second pass runs a few sequences through the smoothed model and rounds each weight matrix with GPTQ, on the inputs
that the int8 product will get. sensitivity.py chooses which layers get two int8 passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig, Site
from export.quantize.int8.ranges import InputRange, search_range
from export.quantize.int8.smoothquant import SmoothedCheckpoint, smoothing_vector
from export.quantize.rounding.gptq import MAX_GPTQ_INPUTS, GramMatrices
from export.quantize.rounding.int8 import Int8Rows, gptq_int8, rounded_activations, rounded_to_nearest
from export.quantize.statistics.activation_stats import Statistics
from export.quantize.statistics.collect import LayerSample
from export.quantize.statistics.parallel import in_order
from export.quantize.statistics.search_pass import LayerInputs, search_pass
from runtime.machine.progress import progress_bar

Array = NDArray[np.float32]

# A block's layers are rounded in parallel up to this many inputs. A larger one keeps all cores busy by itself.
MAX_SIDE_BY_SIDE = 2048


@dataclass(frozen=True, slots=True)
class SiteRanges:
    """The ranges found for one site: for one int8 pass, and for two."""

    one_pass: InputRange
    two_pass: InputRange


class RangeSearch:
    """A `LayerObserver` that searches the ranges of every linear layer's input, the LM head's included."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.ranges: dict[Site, SiteRanges] = {}

    def observe(self, sample: LayerSample, statistics: Statistics) -> None:
        """Search one layer's sites, in parallel."""

        def search(kind: str) -> SiteRanges:
            site = Site(sample.layer, kind)
            given = site, sample.seen[kind], statistics[site].absmax, sample.matrices[kind], self._config
            return SiteRanges(search_range(*given, is_two_pass=False), search_range(*given, is_two_pass=True))

        kinds = [kind for kind in sample.seen if self._config.by_site[Site(sample.layer, kind)].is_quantizable]
        for kind, found in zip(kinds, in_order(search, kinds), strict=True):
            self.ranges[Site(sample.layer, kind)] = found

    def state(self) -> list[Any]:
        return ranges_to_json(self.ranges)

    def restore(self, state: list[Any]) -> None:
        self.ranges = ranges_from_json(state)


def ranges_to_json(ranges: Mapping[Site, SiteRanges]) -> list[Any]:
    """One object per site; "narrow" is one int8 pass, "wide" is two."""
    return [
        {"layer": site.layer, "kind": site.kind, "narrow": found.one_pass._asdict(), "wide": found.two_pass._asdict()}
        for site, found in ranges.items()
    ]


def ranges_from_json(items: Sequence[Any]) -> dict[Site, SiteRanges]:
    """Read what `ranges_to_json` wrote; other keys are ignored. KeyError or TypeError if an object is damaged."""
    return {
        Site(item["layer"], item["kind"]): SiteRanges(InputRange(**item["narrow"]), InputRange(**item["wide"]))
        for item in items
    }


def smoothing_vectors(
    checkpoint: Checkpoint, config: ModelConfig, statistics: Statistics, ranges: Mapping[Site, InputRange]
) -> dict[Site, Array]:
    """Each site's smoothing vector at its strength, from the maxima of all folds."""

    def vector(site: Site) -> Array:
        columns = [np.abs(checkpoint.load(name)).max(0) for name in config.by_site[site].weight_names]
        highest = np.asarray(np.max(columns, axis=0), np.float32)
        return smoothing_vector(statistics[site].highest, highest, ranges[site].strength, site=site, config=config)

    return dict(zip(ranges, in_order(vector, ranges), strict=True))


class RoundedWeights:
    """The int8 weights on disk, one file per site, so that a model larger than memory can be rounded."""

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
    ranges: Mapping[Site, InputRange],
    rounded: RoundedWeights,
) -> None:
    """Round the smoothed weights of every site in `ranges`; `config` is that of the smoothed checkpoint."""
    with progress_bar("round", total=config.num_layers + 1) as bar:
        for layer in search_pass(smoothed, config, sequences):
            found = [kind for kind in layer.matrices if Site(layer.layer, kind) in ranges]
            for kind in set(found) - set(layer.inputs):  # an expert that no token chose
                rounded.put(Site(layer.layer, kind), rounded_to_nearest(layer.matrices[kind]))
            # The largest first, so that all cores finish at about the same time.
            widths = {kind: layer.matrices[kind].shape[1] for kind in found if kind in layer.inputs}
            kinds = sorted(widths, key=widths.__getitem__, reverse=True)
            is_small = widths[kinds[0]] <= MAX_SIDE_BY_SIDE
            round_kind = partial(_rounded, layer, ranges)
            for kind, rows in zip(kinds, (in_order if is_small else map)(round_kind, kinds), strict=True):
                rounded.put(Site(layer.layer, kind), rows)
            bar.update(1)


def _rounded(layer: LayerInputs, ranges: Mapping[Site, InputRange], kind: str) -> Int8Rows:
    """Round one site's weights."""
    matrix, inputs, chosen = layer.matrices[kind], layer.inputs[kind], ranges[Site(layer.layer, kind)]
    if matrix.shape[1] > MAX_GPTQ_INPUTS:
        return rounded_to_nearest(matrix)
    # With aims_at_exact, the weights fit the calibration text and not unseen text: on 4,608 held-out tokens of
    # SmolLM2-135M, KL 0.0043 instead of 0.0039.
    gram = GramMatrices(matrix.shape[1], aims_at_exact=False)
    gram.update(inputs, rounded_activations(inputs, chosen.scale, chosen.fine_scale), layer.token_weight[kind])
    return gptq_int8(matrix, gram)
