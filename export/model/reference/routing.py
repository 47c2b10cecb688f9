"""Routing in numpy and float32: which experts each token gets, and how much their outputs count."""

import numpy as np
from numpy.typing import NDArray

from export.model.routing import Routing, Scores

Array = NDArray[np.float32]


def route(logits: Array, routing: Routing, bias: Array | None) -> tuple[NDArray[np.int64], Array]:
    """The chosen experts of a router's logits `[tokens, experts]`, and their weights: `[tokens, top_k]` both.

    bias: `[experts]`, see `Experts.choice_bias`
    """
    if routing.scores is Scores.SPARSEMIXER:
        return _one_by_one(logits, routing)
    scores = _softmax(logits) if routing.scores is Scores.SOFTMAX else np.asarray(1 / (1 + np.exp(-logits)), np.float32)
    chosen = _largest(
        _allowed(scores if bias is None else scores + bias, routing, has_bias=bias is not None), routing.top_k
    )
    weights: Array = np.take_along_axis(scores, chosen, axis=1)
    if routing.is_normalized:
        total = weights.sum(1, keepdims=True) + np.float32(routing.epsilon)
        weights = weights / np.maximum(total, np.float32(routing.least_sum))
    return chosen, np.asarray(weights * np.float32(routing.scale), np.float32)


def _allowed(scores: Array, routing: Routing, *, has_bias: bool) -> Array:
    """Scores, with -infinity for the experts of groups that are not among the best."""
    if routing.num_groups == 1:
        return scores
    grouped = scores.reshape(len(scores), routing.num_groups, -1)
    of_groups = np.sort(grouped, axis=2)[:, :, -2:].sum(2) if has_bias else grouped.max(2)
    best = _largest(of_groups, routing.top_groups)
    is_best = (best[:, :, None] == np.arange(routing.num_groups)).any(1)
    return np.where(is_best[:, :, None], grouped, np.float32(-np.inf)).reshape(scores.shape)


def _one_by_one(logits: Array, routing: Routing) -> tuple[NDArray[np.int64], Array]:
    """SparseMixer at inference."""
    left, chosen, weights = logits.copy(), [], []
    for _ in range(routing.top_k):
        best = left.argmax(1)[:, None]
        highest = np.take_along_axis(left, best, axis=1)
        is_far = (highest - logits) / np.maximum(np.abs(logits), highest) > np.float32(2 * routing.jitter)
        near = _softmax(np.where(is_far, np.float32(-np.inf), left))
        chosen.append(best)
        weights.append(np.take_along_axis(near, best, axis=1))
        np.put_along_axis(left, best, np.float32(-np.inf), axis=1)
    return np.concatenate(chosen, axis=1), np.concatenate(weights, axis=1)


def _largest(scores: Array, count: int) -> NDArray[np.int64]:
    """The places of the largest scores of each row, the largest first; among equals, the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
