"""One request while it is being generated: from a row of logits to the next event.

Knows sampling, constraints and when a request ends; nothing about slots, batches or other requests.
"""

import time

from runtime.core import FinishReason, Request, TokenEvent
from runtime.sampler import Row, make_sampler


class Sequence:
    """A request's state. Made on the caller's thread, then used by the engine's alone.

    `slot` is None while it waits. Times are seconds of `time.perf_counter`.
    """

    __slots__ = (
        "_sampler",
        "_stop_ids",
        "first_token_s",
        "num_generated",
        "num_prompt",
        "request",
        "slot",
        "submitted_s",
    )

    def __init__(self, request: Request) -> None:
        params = request.params
        self.request = request
        self.slot: int | None = None
        self.num_prompt = len(request.prompt_ids)
        self.num_generated = 0
        self.submitted_s = time.perf_counter()
        self.first_token_s: float | None = None
        self._sampler = make_sampler(params, request.prompt_ids)
        self._stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else request.eos_ids)

    def prepare(self) -> None:
        """Called before the model runs for this sequence: what can be done meanwhile is begun."""
        if self.request.guide is not None:
            self.request.guide.prepare()

    def next_event(self, row: Row) -> TokenEvent:
        """Choose a token from logits float32 [vocab_size] and say what it adds.

        Raises what the sampler or the text stream raises; the request cannot go on after that.
        """
        guide = self.request.guide
        choice = self._sampler.sample(row, None if guide is None else guide.allowed())
        if guide is not None:
            guide.advance(choice.token_id)
        self.num_generated += 1
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter()
        text, reason = self._text_of(choice.token_id)
        return TokenEvent(choice.token_id, text, choice.logprob, choice.top_logprobs, reason)

    def _text_of(self, token_id: int) -> tuple[str, FinishReason | None]:
        stream = self.request.text
        if token_id in self._stop_ids:
            return ("" if stream is None else stream.finish()), FinishReason.STOP
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
