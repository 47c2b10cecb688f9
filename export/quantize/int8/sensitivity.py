"""What each linear layer costs when it alone takes its input in int8, and which layers therefore get two int8 passes.

The cost is KL(float model || model with that one input in int8), in nats a token, on calibration text: for a model
that has learnt the text it is also what the mean negative log-likelihood grows by, so costs add up to a perplexity
increase: exp(sum) - 1. The weights stay exact here, because a second pass mends the input's rounding and not theirs.
Counting both spent passes on qkv, whose weights error compensation mends for nothing: on 4,608 held-out tokens of
SmolLM2-135M KL 0.0053 and 95.5 % of the likeliest tokens, against 0.0043 and 96.2 %. Ordered by cost and not by cost a
multiply-add, so that the budget goes to down but for a hundredth: 0.0032 and 96.8 % (from 0.0039 and 96.5 %).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.checkpoint.protocol import Checkpoint
from export.model.description import LM_HEAD, Block, ModelConfig, Site
from export.model.reference.forward import embed, load_block, load_head, load_norm, rotary_tables, run_block
from export.model.reference.operations import Array, BlockWeights, normed
from export.quantize.int8.ranges import scale_of
from export.quantize.int8.search import SiteRanges
from export.quantize.int8.smoothquant import smoothing_vector
from export.quantize.rounding.int8 import rounded_activations
from export.quantize.statistics.activation_stats import NUM_FOLDS, Statistics
from export.quantize.statistics.parallel import in_order
from runtime.errors import InvalidSetting
from runtime.progress import progress_bar
from runtime.session.scoring import log_softmax

# Beginnings of sequences: enough to rank layers whose costs span three orders of magnitude.
NUM_SEQUENCES, LENGTH = 3, 40
# Sequences of this fold, with ranges from the others: unseen text goes beyond the range it is judged with, too.
FOLD = 1

DEFAULT_MAX_INCREASE = 0.005
"""Perplexity increase that layers in one int8 pass may add up to: half of what a reader is promised at most (1 %)."""

MAX_WIDE_SHARE = 0.25
"""Of the linear layers' multiply-adds, the LM head aside: a layer in two passes takes twice the time."""


_HEAD_SHARE = 0.1
"""An LM head that costs less than this share of the budget stays in one pass."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A site's cost in nats a token, and its multiply-adds a token."""

    site: Site
    kl: float
    macs: int


def measure_costs(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    statistics: Statistics,
    ranges: Mapping[Site, SiteRanges],
) -> list[LayerCost]:
    """Costs of all sites with their narrow ranges.

    All variants run side by side: at layer l there are the float model and one stream for every site before it, so
    each layer is read once.
    """
    heads = [sequence[:LENGTH] for sequence in (sequences[FOLD::NUM_FOLDS] or sequences)[-NUM_SEQUENCES:]]
    edges = np.cumsum([0, *map(len, heads)])
    tables = rotary_tables(config, LENGTH)
    streams = [embed(checkpoint, config.embedding, heads)]
    sites: list[Site] = []
    with progress_bar("sensitivity", total=config.num_layers * (config.num_layers + 1) // 2) as bar:
        for block in config.blocks:
            weights = load_block(checkpoint, block)
            exact = streams[0]

            def run(x: Array, block: Block = block, weights: BlockWeights = weights) -> Array:
                return run_block(weights, block, x, edges, tables)

            def run_changed(
                site: Site, exact: Array = exact, block: Block = block, weights: BlockWeights = weights
            ) -> Array:
                product = _int8_product(site, weights.matrices[site.kind], statistics, ranges, config)
                changed = _Changed(weights, site.kind, product)
                return run_block(weights, block, exact, edges, tables, product=changed)

            own = [linear.site for linear in block.linears if linear.site in ranges]
            streams = [*in_order(run, streams), *in_order(run_changed, own)]
            sites += own
            bar.update(block.layer + 1)
    return _costs(checkpoint, config, streams, sites, statistics, ranges)


def choose_wide(costs: Sequence[LayerCost], *, max_increase: float, keep: Collection[str] = ()) -> set[Site]:
    """Sites for two passes: those of `keep` (as in `layers.11.down`), then the costliest until the rest stays inside
    ln(1 + max_increase) nats; never more than MAX_WIDE_SHARE of the multiply-adds but for those asked for.
    """
    named = {str(cost.site): cost.site for cost in costs}
    unknown = sorted(set(keep) - set(named))
    if unknown:
        raise InvalidSetting(
            f"--two-pass-layers: there is no layer {unknown[0]!r}; layers are called like {next(iter(named))}"
        )
    wide = {named[name] for name in keep}
    layers = [cost for cost in costs if cost.site.kind != LM_HEAD]
    budget = MAX_WIDE_SHARE * sum(cost.macs for cost in layers) - sum(c.macs for c in layers if c.site in wide)
    left = sum(cost.kl for cost in costs if cost.site not in wide)
    limit = float(np.log1p(max_increase))
    for cost in costs:  # the head runs once a token that is asked for, never over a prompt: spared first
        if cost.site.kind == LM_HEAD and left > limit and cost.kl > _HEAD_SHARE * limit:
            wide.add(cost.site)
            left -= cost.kl
    for cost in sorted(layers, key=lambda cost: cost.kl, reverse=True):
        if left <= limit:
            break
        if cost.site not in wide and cost.macs <= budget:
            wide.add(cost.site)
            budget, left = budget - cost.macs, left - cost.kl
    return wide


class _Changed:
    """A block's products, one of them replaced."""

    def __init__(self, weights: BlockWeights, kind: str, product: "_Int8Product") -> None:
        self._weights, self._kind, self._product = weights, kind, product

    def __call__(self, kind: str, x: Array, rows: object) -> Array:
        return self._product(x) if kind == self._kind else self._weights.product(kind, x)


class _Int8Product:
    """x `[n, K]`, rounded as in the int8 graph, times the exact weights."""

    def __init__(self, weight: Array, vector: Array, scale: float) -> None:
        self._weight = weight * vector
        self._vector, self._scale = vector, scale

    def __call__(self, x: Array) -> Array:
        return np.asarray(rounded_activations(x / self._vector, self._scale) @ self._weight.T)


def _int8_product(
    site: Site, weight: Array, statistics: Statistics, ranges: Mapping[Site, SiteRanges], config: ModelConfig
) -> _Int8Product:
    chosen = ranges[site].narrow
    others = np.delete(statistics[site].absmax, FOLD, axis=0).max(0)
    seen = others if others.any() else statistics[site].highest
    vector = smoothing_vector(seen, np.asarray(np.abs(weight).max(0)), chosen.strength, site=site, config=config)
    return _Int8Product(weight, vector, scale_of(seen, vector, chosen.end))


def _costs(
    checkpoint: Checkpoint,
    config: ModelConfig,
    streams: Sequence[Array],
    sites: Sequence[Site],
    statistics: Statistics,
    ranges: Mapping[Site, SiteRanges],
) -> list[LayerCost]:
    site = config.head.linear.site
    head = load_head(checkpoint, config.head)
    norm = load_norm(checkpoint, config.final_norm)
    exact = normed(streams[0], norm, config.final_norm)
    exact_logits = head.logits(exact)
    p = np.exp(log_softmax(exact_logits))
    costs = []
    with progress_bar("compare", total=len(sites) + 1) as bar:

        def cost(x: Array) -> float:
            return _kl(p, head.logits(normed(x, norm, config.final_norm)) - exact_logits)

        for each, kl in zip(sites, in_order(cost, streams[1:]), strict=True):
            costs.append(LayerCost(each, kl, config.num_macs(each)))
            bar.update(1)
        if site in ranges:
            logits = head.finished(_int8_product(site, head.matrix, statistics, ranges, config)(exact))
            costs.append(LayerCost(site, _kl(p, logits - exact_logits), config.num_macs(site)))
        bar.update(1)
    return costs


def _kl(p: Array, change: Array) -> float:
    """KL(p || softmax(log p + change)), mean over the rows of `[n, V]`, in nats: log E[exp(change - E[change])].

    `change` is overwritten. A fifth of the time of two log-softmaxes, and no large numbers that cancel.
    """
    change -= (p * change).sum(-1, keepdims=True)
    np.exp(np.minimum(change, np.float32(80), out=change), out=change)  # beyond, float32 ends
    change *= p
    return float(np.log(change.sum(-1, dtype=np.float64)).mean())
