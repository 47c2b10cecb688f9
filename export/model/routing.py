"""How a router's logits choose experts and weigh their outputs. Knows nothing about weights or numbers."""

from dataclasses import dataclass
from enum import Enum


class Scores(Enum):
    """What a router's logits `[tokens, experts]` become.

    SOFTMAX: over all experts
    SIGMOID: each expert's alone
    SPARSEMIXER: see `Routing.jitter`
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SPARSEMIXER = "sparsemixer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Choose the top_k experts with the largest scores for each token; their scores weigh the outputs.

    is_normalized: the chosen scores are divided by their sum plus `epsilon`
    least_sum: that sum is at least this
    scale: factor of the weights
    num_groups, top_groups: only experts in the best top_groups of num_groups equal groups can be chosen. A group counts
        as its best score, or as the sum of its two best if scores get a bias.
    jitter: SPARSEMIXER (arXiv:2409.12136, section 3) chooses one expert after the other. An expert's weight is its
        softmax among those still to choose whose logit x is near the best m: (m - x) / max(|x|, m) <= 2 * jitter.
    """

    top_k: int
    scores: Scores = Scores.SOFTMAX
    is_normalized: bool = True
    epsilon: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0
