"""Search the int8 range of every linear layer's input during calibration, and round the weights afterwards.

A second pass runs a few sequences through the smoothed model and rounds each weight matrix with GPTQ, on the inputs
that the int8 product will get. It comes second, because which layers get two int8 passes is known only when the costs
of all are (sensitivity.py).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import HeldTensors
from export.model.description import Block, ModelConfig, Site
from export.model.reference.forward import load_block, load_norm
from export.model.reference.operations import BlockWeights, normed
from export.quantize.int8.ranges import InputRange, SiteRanges, column_maxima, search_ranges
from export.quantize.int8.smoothquant import SmoothedCheckpoint, smoothed_config, smoothing_vector
from export.quantize.rounding.gptq import MAX_GPTQ_INPUTS, Factor, GramMatrix, factorized
from export.quantize.rounding.int8 import Int8Rows, gptq_int8, rounded_activations
from export.quantize.statistics.activation_stats import Statistics
from export.quantize.statistics.collect import LayerSample
from export.quantize.statistics.parallel import in_order
from export.quantize.statistics.search_pass import SearchPass, SiteInputs
from runtime.machine.progress import progress_bar

Array = NDArray[np.float32]


class RangeSearch:
    """A `LayerObserver` that searches the ranges of every linear layer's input, the LM head's included."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.ranges: dict[Site, SiteRanges] = {}

    def observe(self, sample: LayerSample, statistics: Statistics) -> None:
        """Search one layer's sites, in parallel."""

        def search(kind: str) -> SiteRanges:
            site = Site(sample.layer, kind)
            matrix = sample.weights.matrices[kind]
            return search_ranges(site, sample.seen[kind], statistics[site].absmax, matrix, self._config)

        kinds = [kind for kind in sample.seen if self._config.by_site[Site(sample.layer, kind)].is_quantizable]
        for kind, found in zip(kinds, in_order(search, kinds), strict=True):
            self.ranges[Site(sample.layer, kind)] = found

    def state(self) -> list[Any]:
        return ranges_to_json(self.ranges)

    def restore(self, state: list[Any]) -> None:
        self.ranges |= ranges_from_json(state)  # the same dict, which others hold


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
        pieces = (piece for name in config.by_site[site].weight_names for piece in checkpoint.pieces(name))
        given = statistics[site].highest, column_maxima(pieces), ranges[site].strength
        return smoothing_vector(*given, site=site, config=config)

    return {site: vector(site) for site in ranges}


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
    checkpoint: Checkpoint,
    config: ModelConfig,
    statistics: Statistics,
    sequences: Sequence[Sequence[int]],
    ranges: Mapping[Site, InputRange],
    rounded: RoundedWeights,
) -> dict[Site, Array]:
    """Smooth and round the weights of every site in `ranges`, block by block; returns the smoothing vectors."""
    run = SearchPass(checkpoint, config, sequences)
    vectors: dict[Site, Array] = {}
    with progress_bar("round", total=config.num_layers + 1) as bar:
        for block in config.blocks:
            own = {linear.site: ranges[linear.site] for linear in block.linears if linear.site in ranges}
            weights, found = _smoothed_block(checkpoint, config, block, statistics, own)
            inputs = run.through(block, weights)
            for site in own:
                rounded.put(site, gptq_int8(weights.matrices[site.kind], _factor(inputs.get(site.kind), ranges[site])))
            vectors |= found
            bar.update(1)
        head = config.head.linear.site
        if head in ranges:
            vectors |= smoothing_vectors(checkpoint, config, statistics, {head: ranges[head]})
            smoothed, changed = SmoothedCheckpoint(checkpoint, config, vectors), smoothed_config(config, vectors)
            hidden = normed(run.stream, load_norm(smoothed, config.final_norm), config.final_norm)
            factor = _factor(SiteInputs(hidden, np.ones(len(hidden), np.float32)), ranges[head])
            pieces = [gptq_int8(piece, factor) for piece in smoothed.pieces(changed.head.linear.weight_names[0])]
            rounded.put(head, Int8Rows(*map(np.concatenate, zip(*pieces, strict=True))))
        bar.update(1)
    return vectors


def _smoothed_block(
    checkpoint: Checkpoint,
    config: ModelConfig,
    block: Block,
    statistics: Statistics,
    ranges: Mapping[Site, InputRange],
) -> tuple[BlockWeights, dict[Site, Array]]:
    """A block's smoothed weights, and the vectors of its sites; its tensors are read once."""
    held = HeldTensors(checkpoint)
    vectors = smoothing_vectors(held, config, statistics, ranges)
    return load_block(SmoothedCheckpoint(held, config, vectors), block), vectors


def _factor(inputs: SiteInputs | None, chosen: InputRange) -> Factor | None:
    """What GPTQ rounds one site's weights with; None to round to nearest, as for an expert that no token chose."""
    if inputs is None or inputs.x.shape[1] > MAX_GPTQ_INPUTS:
        return None
    # The target is the weight itself. If it corrected the errors of the layers before, it would fit the calibration
    # text and not unseen text: on 4,608 held-out tokens of SmolLM2-135M, KL 0.0043 instead of 0.0039.
    gram = GramMatrix(inputs.x.shape[1])
    seen = partial(rounded_activations, scale=chosen.scale, fine_scale=chosen.fine_scale)
    gram.update(inputs.x, inputs.token_weight, seen)
    return factorized(gram)
