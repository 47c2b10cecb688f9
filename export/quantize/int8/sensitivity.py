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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.model.description import LM_HEAD, ModelConfig, Site
from export.model.reference.forward import HeadWeights, embed, load_head, load_norm, rotary_tables, run_block
from export.model.reference.operations import Array, normed
from export.quantize.int8.ranges import SiteRanges, column_maxima, scale_of
from export.quantize.int8.smoothquant import smoothing_vector
from export.quantize.rounding.int8 import rounded_activations
from export.quantize.statistics.activation_stats import NUM_FOLDS, Statistics
from export.quantize.statistics.collect import LayerSample
from export.quantize.statistics.parallel import in_order, slices_of
from export.quantize.statistics.spool import HiddenSpool
from runtime.errors import InvalidSetting
from runtime.session.scoring import log_softmax

# Sequences, and tokens of each: enough to rank layers whose costs span three orders of magnitude.
NUM_SEQUENCES, LENGTH = 3, 40
# The sequences come from this fold and the ranges from the others, so that they are judged on text they have not seen.
FOLD = 1

TOGETHER = 4
"""Variants that run through a block, or through the LM head, as one batch."""

_OUTPUTS_AT_ONCE = 4096  # of the LM head

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


class CostMeasurement:
    """A `LayerObserver` that measures the cost of every site in one int8 pass.

    All variants of the model run beside the calibration text, while a block is in memory: at block l, there are the
    float model and a variant for every site of the blocks before. Their hidden states are in `workdir`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        sequences: Sequence[Sequence[int]],
        ranges: Mapping[Site, SiteRanges],
        workdir: Path,
    ) -> None:
        """ranges: those of another observer, which finds a layer's before this one observes the layer."""
        self._checkpoint, self._config, self._ranges = checkpoint, config, ranges
        self._heads = [sequence[:LENGTH] for sequence in (sequences[FOLD::NUM_FOLDS] or sequences)[-NUM_SEQUENCES:]]
        self._edges = np.cumsum([0, *map(len, self._heads)])
        self._tables = rotary_tables(config, LENGTH)
        self._spool = HiddenSpool(workdir / "costs", config.hidden_size)
        self._sites: list[Site] = []
        self.costs: list[LayerCost] = []

    def observe(self, sample: LayerSample, statistics: Statistics) -> None:
        if sample.layer == self._config.num_layers:
            self._compare(sample, statistics)
            return
        block, weights = self._config.blocks[sample.layer], sample.weights
        streams = self._streams(sample.layer)
        own = [linear.site for linear in block.linears if linear.site in self._ranges]

        def run(some: slice) -> Array:
            together = streams[some]
            edges = np.concatenate([[0], *(self._edges[1:] + idx * self._edges[-1] for idx in range(len(together)))])
            x = together.reshape(-1, together.shape[2])
            return run_block(weights, block, x, edges, self._tables).reshape(together.shape)

        def run_changed(site: Site) -> Array:
            seen = self._seen(site, weights.matrices[site.kind], statistics)

            def product(kind: str, x: Array, rows: object) -> Array:
                return weights.product(kind, seen(x) if kind == site.kind else x)

            return run_block(weights, block, streams[0], self._edges, self._tables, product=product)[None]

        parts = [*in_order(run, slices_of(len(streams), TOGETHER)), *in_order(run_changed, own)]
        for idx, part in enumerate(parts):
            self._spool.append(sample.layer + 1, part, is_first=idx == 0)
        self._sites += own

    def state(self) -> Any:
        return [[*site] for site in self._sites], [[*cost.site, cost.kl, cost.macs] for cost in self.costs]

    def restore(self, state: Any) -> None:
        sites, costs = state
        self._sites = [Site(layer, kind) for layer, kind in sites]
        self.costs = [LayerCost(Site(layer, kind), kl, macs) for layer, kind, kl, macs in costs]

    def _streams(self, layer: int) -> Array:
        """States that enter a layer, or leave the last, `[variants, tokens, hidden]`, the float model's first."""
        if layer == 0:
            return embed(self._checkpoint, self._config.embedding, self._heads)[None]
        num_tokens = int(self._edges[-1])
        found = self._spool.read(layer, 0, (1 + len(self._sites)) * num_tokens)
        return found.reshape(-1, num_tokens, self._config.hidden_size)

    def _seen(self, site: Site, weight: Array, statistics: Statistics) -> Callable[[Array], Array]:
        """What remains of a site's input `[n, K]` in one int8 pass, in the units of the exact weights."""
        chosen = self._ranges[site].one_pass
        others = np.delete(statistics[site].absmax, FOLD, axis=0).max(0)
        absmax = others if others.any() else statistics[site].highest
        vector = smoothing_vector(absmax, column_maxima([weight]), chosen.strength, site=site, config=self._config)
        scale = scale_of(absmax, vector, chosen.end)
        return lambda x: rounded_activations(x / vector, scale) * vector

    def _compare(self, sample: LayerSample, statistics: Statistics) -> None:
        """Compare the logits of every variant with the float model's; the LM head's cost comes last."""
        config, site = self._config, self._config.head.linear.site
        head = load_head(self._checkpoint, config.head, sample.weights.matrices[site.kind])
        norm = load_norm(self._checkpoint, config.final_norm)
        hidden = normed(self._streams(config.num_layers), norm, config.final_norm)
        if site in self._ranges:
            self._sites.append(site)
            hidden = np.concatenate([hidden, self._seen(site, head.matrix, statistics)(hidden[:1])])
        found = zip(self._sites, _divergences(head, hidden), strict=True)
        self.costs = [LayerCost(each, kl, config.num_macs(each)) for each, kl in found]


def _divergences(head: HeadWeights, hidden: Array) -> list[float]:
    """KL(p || q) for the logits of hidden[0] and of each of hidden[1:], `[tokens, hidden]`, mean over tokens, in nats.

    It is log E[exp(change of the logits)] - E[change], which takes a fifth of the time of two log-softmaxes. All
    variants meet one piece of the vocabulary after the other.
    """
    exact = np.empty((hidden.shape[1], len(head.matrix)), np.float32)
    pieces = slices_of(len(head.matrix), _OUTPUTS_AT_ONCE)
    for piece in pieces:
        exact[:, piece] = head.between(piece).logits(hidden[0])
    p = np.exp(log_softmax(exact))
    variants, groups = hidden[1:], slices_of(len(hidden) - 1, TOGETHER)

    def expectations(piece: slice) -> NDArray[np.float64]:
        """E[exp(change)] and E[change] over a piece of the vocabulary, `[2, variants, tokens]`."""
        found, part = np.empty((2, *variants.shape[:2])), head.between(piece)
        for group in groups:
            change = part.logits(variants[group].reshape(-1, hidden.shape[2])).reshape(-1, len(p), part.num_outputs)
            change -= exact[:, piece]
            found[1, group] = np.einsum("vtn,tn->vt", change, p[:, piece])
            np.exp(np.clip(change, -80, 80, out=change), out=change)  # beyond 88 and -103 float32 has no exp
            found[0, group] = np.einsum("vtn,tn->vt", change, p[:, piece])
        return found

    mean_exp, mean = sum(in_order(expectations, pieces), np.zeros((2, *variants.shape[:2])))
    return [float(kl) for kl in (np.log(mean_exp / p.sum(1, dtype=np.float64)) - mean).mean(1)]


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
