"""Measure how much each linear layer alone loses with its input in int8, and choose the layers that get two passes.

A layer's cost is KL(float model || model with that one input in int8), in nats per token, on calibration text. For text
that the model predicts well, the mean negative log-likelihood grows by as much, so costs add up to a perplexity
increase of exp(sum) - 1. The weights stay exact here, because a second pass corrects the rounding of the input and not
of the weights. Measured on 4,608 held-out tokens of SmolLM2-135M:

    costs of input and weights    KL 0.0053, top-1 agreement 95.5 %    spends passes on qkv, whose weights GPTQ corrects
    costs of the input alone      KL 0.0043, 96.2 %
    ordered by cost per MAC       KL 0.0039, 96.5 %
    ordered by cost               KL 0.0032, 96.8 %                    nearly all passes go to down
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
from runtime.machine.progress import progress_bar
from runtime.session.scoring import log_softmax

# Sequences, and tokens of each: enough to rank layers whose costs span three orders of magnitude.
NUM_SEQUENCES, LENGTH = 3, 40
# The sequences come from this fold and the ranges from the others, so that they are judged on text they have not seen.
FOLD = 1

DEFAULT_MAX_INCREASE = 0.005
"""Predicted perplexity increase of all layers in one pass. It is half of the promised maximum of 1 %."""

MAX_TWO_PASS_SHARE = 0.25
"""Share of the multiply-adds, LM head excluded, that layers in two passes may have: they take twice the time."""

_HEAD_SHARE = 0.1
"""An LM head that costs less than this share of the limit stays in one pass."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A site's cost in nats per token, and its multiply-adds per token."""

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
    """Measure the cost of every site in one int8 pass.

    All variants of the model run together, so that each block is read once: at block l, there are the float model and a
    variant for every site of the blocks before.
    """
    heads = [sequence[:LENGTH] for sequence in (sequences[FOLD::NUM_FOLDS] or sequences)[-NUM_SEQUENCES:]]
    edges = np.cumsum([0, *map(len, heads)])
    tables = rotary_tables(config, LENGTH)
    streams = [embed(checkpoint, config.embedding, heads)]
    sites: list[Site] = []

    def run_changed(block: Block, weights: BlockWeights, exact: Array, site: Site) -> Array:
        int8_product = _int8_product(site, weights.matrices[site.kind], statistics, ranges, config)

        def product(kind: str, x: Array, rows: object) -> Array:
            return int8_product(x) if kind == site.kind else weights.product(kind, x)

        return run_block(weights, block, exact, edges, tables, product=product)

    with progress_bar("sensitivity", total=config.num_layers * (config.num_layers + 1) // 2) as bar:
        for block in config.blocks:
            weights = load_block(checkpoint, block)
            run = partial(run_block, weights, block, edges=edges, tables=tables)
            own = [linear.site for linear in block.linears if linear.site in ranges]
            changed = partial(run_changed, block, weights, streams[0])
            streams = [*in_order(run, streams), *in_order(changed, own)]
            sites += own
            bar.update(block.layer + 1)
    return _costs(checkpoint, config, streams, sites, statistics, ranges)


def choose_two_pass(costs: Sequence[LayerCost], *, max_increase: float, keep: Collection[str] = ()) -> set[Site]:
    """Choose the sites that get two passes.

    First those that `keep` names (`layers.11.down`), then the most expensive ones, until the others cost no more than
    ln(1 + max_increase) nats together. Except for `keep`, they have at most MAX_TWO_PASS_SHARE of the multiply-adds.
    """
    named = {str(cost.site): cost.site for cost in costs}
    unknown = sorted(set(keep) - set(named))
    if unknown:
        raise InvalidSetting(
            f"--two-pass-layers: there is no layer {unknown[0]!r}; layers are called like {next(iter(named))}"
        )
    chosen = {named[name] for name in keep}
    layers = [cost for cost in costs if cost.site.kind != LM_HEAD]
    budget = MAX_TWO_PASS_SHARE * sum(cost.macs for cost in layers) - sum(c.macs for c in layers if c.site in chosen)
    left = sum(cost.kl for cost in costs if cost.site not in chosen)
    limit = float(np.log1p(max_increase))
    for cost in costs:  # the head comes first: it does not run over a prompt, so its second pass is cheap
        if cost.site.kind == LM_HEAD and left > limit and cost.kl > _HEAD_SHARE * limit:
            chosen.add(cost.site)
            left -= cost.kl
    for cost in sorted(layers, key=lambda cost: cost.kl, reverse=True):
        if left <= limit:
            break
        if cost.site not in chosen and cost.macs <= budget:
            chosen.add(cost.site)
            budget, left = budget - cost.macs, left - cost.kl
    return chosen


def _int8_product(
    site: Site, weight: Array, statistics: Statistics, ranges: Mapping[Site, SiteRanges], config: ModelConfig
) -> Callable[[Array], Array]:
    """The product of x `[n, K]`, fake-quantized as in the int8 graph, and the exact weights."""
    chosen = ranges[site].one_pass
    others = np.delete(statistics[site].absmax, FOLD, axis=0).max(0)
    seen = others if others.any() else statistics[site].highest
    vector = smoothing_vector(seen, np.asarray(np.abs(weight).max(0)), chosen.strength, site=site, config=config)
    scale, smoothed = scale_of(seen, vector, chosen.end), weight * vector
    return lambda x: np.asarray(rounded_activations(x / vector, scale) @ smoothed.T)


def _costs(
    checkpoint: Checkpoint,
    config: ModelConfig,
    streams: Sequence[Array],
    sites: Sequence[Site],
    statistics: Statistics,
    ranges: Mapping[Site, SiteRanges],
) -> list[LayerCost]:
    """Compare the logits of every variant with those of the float model, streams[0]; the LM head's cost comes last."""
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

    `change` is overwritten. This takes a fifth of the time of two log-softmaxes, and no large numbers cancel.
    """
    change -= (p * change).sum(-1, keepdims=True)
    np.exp(np.minimum(change, np.float32(80), out=change), out=change)  # exp overflows float32 beyond 88
    change *= p
    return float(np.log(change.sum(-1, dtype=np.float64)).mean())
