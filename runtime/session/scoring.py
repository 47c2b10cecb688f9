"""Teacher-forced scoring: the logits of given tokens, and how far two sets of logits are apart.

Streams in chunks of rows, so that memory does not grow with the length of the text or the vocabulary.
Perplexity is exp of the mean negative log-likelihood per predicted token, in nats; KL is in nats per token.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.session.session import Batch, Session

CHUNK = 128  # rows of logits held at once: 25 MB for a vocabulary of 49,152


class ScoredChunk(NamedTuple):
    """Logits float32 `[r, vocab]` of positions start .. start + r of one sequence, and the ids that follow there."""

    sequence_idx: int
    start: int
    logits: NDArray[np.float32]
    next_ids: NDArray[np.int64]


def windows_of(ids: Sequence[int], window: int) -> list[list[int]]:
    """Cut ids into non-overlapping windows; a rest shorter than two tokens predicts nothing and is dropped."""
    cut = [list(ids[start : start + window]) for start in range(0, len(ids), window)]
    return [part for part in cut if len(part) > 1]


def score(session: Session, sequences: Sequence[Sequence[int]], *, slot: int = 0) -> Iterator[ScoredChunk]:
    """Prefill each sequence in chunks and yield the logits that predict its tokens 1 .. n - 1.

    The logits are the session's buffer: use them before asking for the next chunk.
    """
    for idx, sequence in enumerate(sequences):
        for start in range(0, len(sequence) - 1, CHUNK):
            stop = min(start + CHUNK, len(sequence) - 1)
            ids = np.array([sequence[start:stop]], np.int64)
            length = stop - start
            batch = Batch(
                first_slot=slot,
                token_ids=ids,
                past_len=np.array([start], np.int32),
                query_len=np.array([length], np.int32),
                logits_idx=np.arange(length, dtype=np.int64),
            )
            yield ScoredChunk(idx, start, session.run(batch), np.array(sequence[start + 1 : stop + 1], np.int64))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise log-probabilities of float32 `[r, vocab]`."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


@dataclass(slots=True)
class Likelihood:
    """Running perplexity."""

    num_tokens: int = 0
    nll: float = 0.0

    def add(self, log_probs: NDArray[np.float32], next_ids: NDArray[np.int64]) -> None:
        """Count the tokens that follow under log-probabilities `[r, vocab]`."""
        self.nll -= float(log_probs[np.arange(len(next_ids)), next_ids].sum(dtype=np.float64))
        self.num_tokens += len(next_ids)

    @property
    def perplexity(self) -> float:
        """exp(mean nll); infinite where the mean overflows, NaN before the first token and after a NaN."""
        if not self.num_tokens:
            return math.nan
        mean = self.nll / self.num_tokens
        return math.inf if mean >= 700 else math.exp(mean)


@dataclass(slots=True)
class Distance:
    """How far candidate logits are from reference logits, over all the rows given."""

    num_rows: int = 0
    max_logit_error: float = 0.0
    kl_sum: float = 0.0
    num_top1_equal: int = 0
    reference: Likelihood = field(default_factory=Likelihood)
    candidate: Likelihood = field(default_factory=Likelihood)

    def add(self, reference: NDArray[np.float32], candidate: NDArray[np.float32], next_ids: NDArray[np.int64]) -> None:
        """Compare logits float32 `[r, vocab]` of the same positions."""
        self.num_rows += len(next_ids)
        error = float(np.abs(reference - candidate).max())
        # max() would drop a NaN in silence.
        self.max_logit_error = error if math.isnan(error) else max(self.max_logit_error, error)
        log_p, log_q = log_softmax(reference), log_softmax(candidate)
        self.kl_sum += float((np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64))
        self.num_top1_equal += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.reference.add(log_p, next_ids)
        self.candidate.add(log_q, next_ids)

    @property
    def kl(self) -> float:
        """Mean KL(reference || candidate) in nats per token."""
        return self.kl_sum / self.num_rows

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.num_top1_equal / self.num_rows

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one per cent worse than the reference."""
        return self.candidate.perplexity / self.reference.perplexity - 1
