"""Follows one request through its grammar: computes the allowed next tokens while the model runs.

A `GrammarGuide` wraps a matcher of llguidance (MIT), which computes a mask over a vocabulary of 49,152 in some 50 us
without the GIL. Knows nothing of how the grammar was written; `runtime/grammar/grammar.py` makes the guides.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as NotInTimeError
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InvalidRequest
from runtime.grammar.kept import SharedLexer
from runtime.grammar.notation import brief

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = NDArray[np.bool_]
Seen = TypeVar("Seen")

MAX_WAIT_S = 0.5
"""Longest that the batch waits for one mask; then its request ends. Ordinary masks take 20 to 200 us."""
FREE_S = 0.5
FREE_PER_TOKEN_S = 0.002
"""Processor time that the masks of one request may take, at first and for each token. Ambiguous grammars need 100 ms a
token, and every request in the batch would wait for them. Processor time, not wall time: a busy machine must not end
requests."""
MAX_FORESIGHT_S = 0.005
"""After a look ahead that takes longer there is no other: forced text is searched to its end, which may be 12,000
tokens away. An ordinary look ahead takes 10 us."""
WORD_BITS = 32


class GrammarGuide:
    """Implements `runtime.core.TokenGuide`. Used by one thread at a time; masks come from `pool`'s threads."""

    def __init__(self, matcher: "LLMatcher", first: Mask, pool: Executor, *, param: str, lexer: SharedLexer) -> None:
        """`matcher` stands at its beginning, where `first` bool [vocab_size] is the mask. `lexer` is shared with the
        other requests of the grammar."""
        self._matcher = matcher
        self._masks = [first]  # here, and after each token of the draft
        self._draft: list[int] = []
        self._job: Future[None] | None = None
        self._job_draft: list[int] = []
        self._pool = pool
        self._param = param
        self._vocab_size = len(first)
        self._spent_s = 0.0
        self._num_tokens = 0
        self._lexer = lexer
        self._has_foresight = lexer.has_foresight

    @property
    def is_stopped(self) -> bool:
        """Whether nothing but an end-of-text token may follow."""
        return bool(self._matcher.is_stopped())

    def prepare(self, draft_ids: Sequence[int] = ()) -> None:
        """Begin to compute the masks, here and after each token of the draft that is allowed."""
        draft = list(draft_ids)
        if self._job is None and not (self._masks and draft == self._draft):
            self._job, self._job_draft = self._pool.submit(self._compute, draft), draft

    def allowed(self) -> Mask:
        """bool [vocab_size]. Waits for what `prepare` began, at most MAX_WAIT_S."""
        self._settle()
        if not self._masks:
            self._compute([])
        return self._masks[0]

    def advance(self, token_id: int) -> None:
        """Take an allowed token."""
        self._settle()
        is_drafted = self._draft[:1] == [token_id] and len(self._masks) > 1
        self._masks = self._masks[1:] if is_drafted else []
        self._draft = self._draft[1:] if is_drafted else []
        self._matcher.consume_token(token_id)
        self._check()
        self._num_tokens += 1

    def forced(self) -> list[int]:
        return self._look_ahead(self._matcher.compute_ff_tokens, [])

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        ids = list(token_ids)
        return self._look_ahead(lambda: self._matcher.validate_tokens(ids), len(ids))

    def _look_ahead(self, look: Callable[[], Seen], unknown: Seen) -> Seen:
        """The result of `look`, or `unknown`. Errors stay in the matcher, and the next mask or token raises them."""
        if not self._has_foresight or self._job is not None or self._matcher.is_error():
            return unknown
        started_s = time.thread_time()
        try:
            seen = look()
        except ValueError:  # too complex to tell
            seen = unknown
        taken_s = time.thread_time() - started_s
        self._spend(taken_s, num_masks=0)
        self._has_foresight = taken_s <= MAX_FORESIGHT_S
        return unknown if self._matcher.is_error() else seen

    def _settle(self) -> None:
        """Wait for the masks that are being computed."""
        job, self._job = self._job, None
        if job is None:
            return
        if job.cancel():  # not begun: other masks are queued before it, and they may be slow
            self._compute(self._job_draft)
            return
        try:
            job.result(MAX_WAIT_S)
        except NotInTimeError:
            raise self._too_complex(f"a step takes more than {MAX_WAIT_S} s") from None

    def _compute(self, draft: list[int]) -> None:
        """Masks here and along the draft, as far as it is allowed. Runs on any thread, one at a time."""
        started_s = time.thread_time()
        self._masks, self._draft = [self._mask()], draft
        for token_id in draft:
            # After the end nothing is computed: a token taken there cannot be rolled back.
            if self._matcher.is_stopped() or not self._masks[-1][token_id] or not self._matcher.consume_token(token_id):
                break
            self._masks.append(self._mask())
        if len(self._masks) > 1:
            self._matcher.rollback(len(self._masks) - 1)
        self._check()
        self._spend(time.thread_time() - started_s, num_masks=len(self._masks))
        if self._spent_s > FREE_S + FREE_PER_TOKEN_S * self._num_tokens:
            raise self._too_complex(f"{self._num_tokens} tokens took {self._spent_s:.1f} s")

    def _mask(self) -> Mask:
        mask = mask_of(self._matcher, self._vocab_size)
        self._check()
        return mask

    def _spend(self, taken_s: float, *, num_masks: int) -> None:
        self._spent_s += taken_s
        self._lexer.note(taken_s, num_masks=num_masks, vocab_size=self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            self._lexer.note_failure()
            raise self._too_complex(brief(self._matcher.get_error()))

    def _too_complex(self, reason: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self._param} is too complex to follow ({reason}); make it simpler or less ambiguous", param=self._param
        )


def mask_of(matcher: "LLMatcher", vocab_size: int) -> Mask:
    """The tokens that a matcher allows next, bool [vocab_size]; an error stays in the matcher."""
    words = np.zeros(-(-vocab_size // WORD_BITS), np.uint32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
