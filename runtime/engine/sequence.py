"""One request while it is being generated: from a row of logits to the next event.

Knows sampling, constraints and when a request ends; nothing about slots, batches or other requests.
"""

import math
import time
from collections.abc import Sequence
from typing import Protocol

from runtime.core import FinishReason, Logprobs, Request, TokenEvent
from runtime.engine.sampling.logits import Row
from runtime.engine.sampling.logprobs import logprobs_of
from runtime.engine.sampling.sampler import make_sampler, num_top
from runtime.session.session import TopRow


class TokenListener(Protocol):
    """What a drafter keeps for one sequence. Only the drafter knows what is in it."""

    def push(self, token_id: int) -> None:
        """The text goes on with this token."""
        ...


class LiveSequence:
    """A request's state. Made on the caller's thread, then used by the engine's alone.

    `slot` is None while it waits. A preempted request waits again, and what its slot held is computed again; all other
    state goes on as it was. `admission_idx` counts requests by their first admission. Of `fill_ids` the first
    `num_fill` are prefilled; those after them run one by one, like the decode runs that chose them (`begin_again`).

    The `num_top` most likely tokens of a row are enough for it; None: it needs the whole row. `prefix_keys` name the
    blocks of its prompt that the prefix cache may hold, and `num_kept` counts those that need not be stored again.
    `draft_state` is None where nothing is drafted. Times are seconds of `time.perf_counter`.
    """

    def __init__(self, request: Request) -> None:
        params = request.params
        self.request = request
        self.slot: int | None = None
        self.num_prompt = len(request.prompt_ids)
        self.num_generated = 0
        self.generated_ids: list[int] = []
        self.fill_ids: Sequence[int] = request.prompt_ids
        self.num_fill = self.num_prompt
        self.admission_idx: int | None = None
        self.num_preempted = 0
        self.prefix_keys: list[bytes] = []
        self.num_kept = 0
        self.draft_state: TokenListener | None = None
        self.submitted_s = time.perf_counter()
        timeout_s = request.options.timeout_s
        self.deadline_s = math.inf if timeout_s is None else self.submitted_s + timeout_s
        self.first_token_s: float | None = None
        self._prompt_logprobs: list[Logprobs] = []
        self._is_scored = False
        self._stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else request.eos_ids)
        self._min_tokens = params.min_tokens if self._stop_ids else 0
        self.num_top = None if self._min_tokens else num_top(params)
        self._sampler = make_sampler(params, request.prompt_ids, self._stop_ids)

    def prepare(self, draft: Sequence[int] = ()) -> None:
        """Begin what can be done while the model runs for this sequence."""
        if self.request.guide is not None:
            self.request.guide.prepare(draft)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether every position of the prompt is to be scored."""
        return self.request.params.prompt_logprobs is not None and not self._is_scored

    def begin_again(self, *, is_run_exact: bool) -> None:
        """Its slot was taken away: K and V of the prompt and of the generated tokens are to be computed again, bit for
        bit as they were.

        is_run_exact: as in SessionInfo. If so, a prefill may compute all of them. If not, generated tokens are run one
            by one as before, because a run of a single token rounds otherwise than a longer one
        """
        assert self.slot is None
        self.num_preempted += 1
        self.num_kept = 0
        self._prompt_logprobs.clear()
        self.fill_ids = [*self.request.prompt_ids, *self.generated_ids]
        self.num_fill = len(self.fill_ids) if is_run_exact else self.num_prompt

    @property
    def is_catching_up(self) -> bool:
        """Whether some of its generated tokens are not prefilled but run one by one again."""
        return len(self.fill_ids) > self.num_fill

    def score_prompt(self, rows: Row) -> TokenEvent | None:
        """Take logits float32 [R, vocab_size] of the prompt's next positions, each of which predicts the token after
        it. Returns the event with all log-probabilities after the last of them."""
        num_top = self.request.params.prompt_logprobs
        assert num_top is not None
        if not len(rows) and self.num_prompt > 1:
            return None  # the last token had a run of its own; the event came before it
        for row in rows:
            token_id = self.request.prompt_ids[len(self._prompt_logprobs) + 1]
            self._prompt_logprobs.append(logprobs_of(row, token_id, num_top))
        if len(self._prompt_logprobs) < self.num_prompt - 1:
            return None
        self._is_scored = True
        return TokenEvent(None, "", prompt_logprobs=tuple(self._prompt_logprobs))

    def next_event(self, row: Row | TopRow) -> TokenEvent:
        """Choose a token from logits float32 [vocab_size], or from its `num_top` most likely tokens; return its event.
        For `max_tokens` 0, return the end.

        Raises what the sampler or the text stream raises; the request cannot go on after that.
        """
        if self.request.params.max_tokens == 0:
            return TokenEvent(None, "", finish_reason=FinishReason.LENGTH)
        guide = self.request.guide
        if isinstance(row, TopRow):
            choice = self._sampler.sample_top(row)
        else:
            choice = self._sampler.sample(row, None if guide is None else guide.allowed())
        if guide is not None:
            guide.advance(choice.token_id)
        self.num_generated += 1
        self.generated_ids.append(choice.token_id)
        if self.num_generated == self._min_tokens:
            self.num_top = num_top(self.request.params)
        if self.draft_state is not None:
            self.draft_state.push(choice.token_id)
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter()
        text, reason = self._text_of(choice.token_id)
        return TokenEvent(choice.token_id, text, choice.logprob, choice.top_logprobs, reason)

    def _text_of(self, token_id: int) -> tuple[str, FinishReason | None]:
        stream = self.request.text
        # A grammar may allow only a stop token; before `min_tokens` that is an ordinary token of the answer.
        if token_id in self._stop_ids and (self.num_generated > self._min_tokens or token_id in self.request.eos_ids):
            return ("" if stream is None else stream.finish(token_id)), FinishReason.STOP
        text = ""
        if stream is not None:
            text, is_stopped = stream.push(token_id)
            if is_stopped:
                return text, FinishReason.STOP
        is_complete = self.request.guide is not None and self.request.guide.is_stopped
        if not is_complete and self.num_generated < self.request.params.max_tokens:
            return text, None
        reason = FinishReason.STOP if is_complete else FinishReason.LENGTH
        return text + ("" if stream is None else stream.finish()), reason

    def tpot_s(self, now_s: float) -> float | None:
        """Mean seconds per token after the first; None below two tokens."""
        if self.first_token_s is None or self.num_generated < 2:
            return None
        return (now_s - self.first_token_s) / (self.num_generated - 1)
