"""Penalties for repetition, and the request's bias on single tokens."""

from collections.abc import Iterable

import numpy as np

from runtime.core import SamplingParams
from runtime.engine.sampling.logits import Row


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request changes any logit."""
    return bool(
        params.logit_bias or params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


class Penalties:
    """Penalties and bias, kept for the tokens they touch instead of the whole vocabulary.

    `_ids[:n]` are the tokens seen, `_counts[:n]` how often each was generated: 0 for those of the prompt
    only.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        # The other two penalties are for generated tokens alone, and would find a count of 0.
        seen = np.unique(np.fromiter(prompt_ids, np.int64)) if params.repetition_penalty != 1 else np.empty(0, np.int64)
        self._num_seen = len(seen)
        self._ids = np.zeros(self._num_seen + 64, np.int64)
        self._ids[: self._num_seen] = seen
        self._counts = np.zeros(len(self._ids), np.float32)
        self._position = {token_id: i for i, token_id in enumerate(seen.tolist())}
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)

    def apply(self, row: Row) -> Row:
        """A copy of the row with penalties and bias."""
        edited = row.copy()
        ids, counts = self._ids[: self._num_seen], self._counts[: self._num_seen]
        if len(ids):
            seen, repetition = edited[ids], np.float32(self._params.repetition_penalty)
            seen = np.where(seen > 0, seen / repetition, seen * repetition)
            seen -= np.float32(self._params.frequency_penalty) * counts
            seen -= np.float32(self._params.presence_penalty) * (counts > 0)
            edited[ids] = seen
        edited[self._bias_ids] += self._biases
        return edited

    def count(self, token_id: int) -> None:
        """Note a generated token."""
        position = self._position.get(token_id)
        if position is None:
            position = self._position[token_id] = self._num_seen
            if position == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[position] = token_id
            self._num_seen += 1
        self._counts[position] += 1
