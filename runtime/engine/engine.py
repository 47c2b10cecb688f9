"""Continuous batching: schedule, run, sample, emit. One thread calls everything here; runtime/engine/thread.py is
that thread.

The engine knows nothing about text except that a request may carry a `TextStream`, and nothing about HTTP.
"""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from itertools import islice, repeat

import numpy as np

from runtime.core import EngineObserver, EngineStats, FinishReason, Request, TokenEvent
from runtime.engine.answer_lengths import AnswerLengths
from runtime.engine.drafter import Drafter
from runtime.engine.planning.chunk import DEFAULT_BOUNDS, LatencyBounds
from runtime.engine.planning.run import Run
from runtime.engine.prefix_cache import PrefixCache, block_keys
from runtime.engine.sampling.logits import Row
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import LiveSequence
from runtime.errors import InvalidRequest, PromptTooLong
from runtime.machine.sizes import format_bytes
from runtime.session.session import Session, SessionInfo, TopRow, TopSession

log = logging.getLogger(__name__)


class Engine:
    """Runs requests on a session in steps; they join and leave between two steps.

    prefill_chunk: most prompt tokens run between two decode steps; None: as many as the bounds leave time for
    max_queue_wait_s: a request without a slot this many seconds after its submission ends with QUEUE_TIMEOUT
    prefix_cache: bytes for K and V of prompt beginnings that later prompts reuse; 0 is none
    drafter: proposes draft tokens; unused (one token a row and step) with a session that is not ragged and cut-exact,
        or has states
    """

    def __init__(
        self,
        session: Session,
        *,
        prefill_chunk: int | None = None,
        bounds: LatencyBounds = DEFAULT_BOUNDS,
        prefix_cache: int = 0,
        max_queue_wait_s: float | None = None,
        drafter: Drafter | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        self.info = session.info
        self.live: dict[str, LiveSequence] = {}
        self._session = session
        self._top_session = session if isinstance(session, TopSession) else None
        self._observer = observer
        self._prefill_chunk, self._bounds = prefill_chunk, bounds
        self._prefix_cache = prefix_cache
        self._max_queue_wait_s = math.inf if max_queue_wait_s is None else max_queue_wait_s
        self._next_expiry_s = math.inf
        can_draft = session.info.is_ragged and session.info.is_cut_exact and not session.info.has_states
        self._drafter = drafter if can_draft else None
        self.max_len = _longest(session.info)
        self._lengths = AnswerLengths(self.max_len)
        self._scheduler = self._new_scheduler()
        self._model_s = 0.0

    def prepare(self, request: Request) -> LiveSequence:
        """Check a request against the session and make its state. Any thread may call this.

        Raises InvalidRequest for an empty prompt, a token id outside the vocabulary or `min_tokens` above
        `max_tokens`, PromptTooLong with both lengths.
        """
        ids, num_new = request.prompt_ids, request.params.max_tokens
        if not ids:
            raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
        self._check_ids(ids, "prompt")
        if request.params.min_tokens > num_new:
            raise InvalidRequest(
                f"min_tokens is {request.params.min_tokens}, but the answer can have {num_new} tokens at most; "
                "lower min_tokens or raise max_tokens",
                param="min_tokens",
            )
        if len(ids) + num_new > self.max_len:
            raise PromptTooLong(
                f"{self._limit_text()} However, you requested "
                f"{len(ids) + num_new} tokens ({len(ids)} in the prompt, {num_new} for the answer). "
                "Shorten the prompt or lower max_tokens.",
                param="prompt",
            )
        sequence = LiveSequence(request)
        if self._prefix_cache and not sequence.wants_prompt_logits:
            sequence.prefix_keys = block_keys(ids, request.options.cache_salt)
        if self._drafter is not None:
            self._check_ids(request.options.prediction_ids, "prediction")
            self._drafter.attach(sequence)
        return sequence

    def _limit_text(self) -> str:
        if self.max_len == self.info.capacity:
            return f"This model's maximum context length is {self.max_len} tokens."
        return (
            f"This server has {format_bytes(self.info.kv_bytes)} of KV memory (--kv-memory), which holds "
            f"{self.max_len} tokens of the {self.info.capacity} of this model's context."
        )

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.info.vocab_size):
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidRequest(
                f"token id {bad} is not in the vocabulary, 0 to {self.info.vocab_size - 1}", param=param
            )

    @property
    def is_speculating(self) -> bool:
        """Whether requests may take drafts along."""
        return self._drafter is not None

    def add(self, sequence: LiveSequence) -> None:
        """Queue a prepared sequence; it joins when a slot is free."""
        self.live[sequence.request.request_id] = sequence
        self._scheduler.add(sequence)
        self._next_expiry_s = min(self._next_expiry_s, self._expiry_s(sequence))

    def cancel(self, request_id: str) -> None:
        """End a request with CANCELLED and free its slot. One that has ended already is ignored."""
        if (sequence := self.live.get(request_id)) is not None:
            self._end(sequence, TokenEvent(None, "", finish_reason=FinishReason.CANCELLED))

    def fail(self, reason: str, arrived: Iterable[LiveSequence] = ()) -> None:
        """End every request with ERROR, those that have `arrived` and were not added too, and give the memory back.

        Trusts only `live`: the step that broke may have left the rest inconsistent.
        """
        ended, event = [*self.live.values(), *arrived], _failure(reason)
        self.live.clear()
        for sequence in ended:
            sequence.request.sink(event)
        self._scheduler = self._new_scheduler()
        # Last: if the observer is what broke, every request has its reason by now.
        for sequence in ended:
            self._notify_end(sequence, FinishReason.ERROR)
        for slot in range(self.info.num_slots):
            self._session.drop_slot(slot)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        """Counts at this moment; any thread may call this."""
        slots, memory, info = self._scheduler.slots, self._scheduler.memory, self.info
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=slots.num_used,
            num_slots=slots.num_slots,
            kv_used_tokens=slots.used_tokens,
            kv_total_tokens=info.kv_bytes // info.kv_bytes_per_token,
            kv_used_bytes=memory.used if info.kv_layout is not None else info.kv_bytes,
            kv_total_bytes=info.kv_bytes,
            prefix_cache_bytes=self._scheduler.cache.num_bytes,
            num_preempted=self._scheduler.num_preempted,
        )

    def step(self) -> None:
        """Give every decoding request a token, and at most one chunk of prompts a prefill."""
        started_s, self._model_s = time.perf_counter(), 0.0
        if started_s >= self._next_expiry_s:
            self._expire(started_s)
        num_decode = num_prefill_tokens = 0
        for run in self._scheduler.plan():
            rows, model_s = self._run(run)
            self._model_s += model_s
            self._scheduler.advance(run, model_s)
            self._score(run, rows)
            if run.drafts:
                self._emit_drafted(run, rows)
            else:
                for sequence, row in zip(run.sequences, rows, strict=False):
                    self._emit(sequence, row)
            num_decode += run.num_decode
            num_prefill_tokens += run.num_prefill_tokens
        if self._observer is not None:
            step_s = time.perf_counter() - started_s
            self._observer.on_step(
                num_decode=num_decode,
                num_prefill_tokens=num_prefill_tokens,
                step_s=step_s,
                model_s=self._model_s,
            )

    def _run(self, run: Run) -> tuple[Iterable[Row | TopRow], float]:
        """Run the model: whole rows of logits, or their most likely tokens where those are enough for every sequence;
        and the seconds that it took."""
        for sequence, draft in zip(run.sequences, run.drafts or repeat(()), strict=False):
            sequence.prepare(draft)
        started_s = time.perf_counter()
        top = self._top_session
        rows: Iterable[Row | TopRow]
        if top is not None and not run.scored and _suffices(top.num_top, run.sequences):
            rows = top.run_top(run.batch)
        else:
            rows = self._session.run(run.batch)
        model_s = time.perf_counter() - started_s
        if self._drafter is not None and run.num_decode:
            num_drafted = sum(map(len, run.drafts))
            self._drafter.observe_run(num_rows=run.num_decode, num_drafted=num_drafted, seconds=model_s)
        return rows, model_s

    def _score(self, run: Run, rows: Iterable[Row | TopRow]) -> None:
        """Give scored prompts the logits of their positions. The last of them goes out before the first token."""
        start = len(run.sequences)
        for sequence, num_rows in run.scored:
            assert isinstance(rows, np.ndarray)
            event = sequence.score_prompt(rows[start : start + num_rows])
            start += num_rows
            if event is not None:
                sequence.request.sink(event)

    def _emit_drafted(self, run: Run, rows: Iterable[Row | TopRow]) -> None:
        """Send each sequence's events, up to the first token that differs from its draft."""
        following = iter(rows)
        for sequence, draft in zip(run.sequences, run.drafts, strict=True):
            usage = sequence.request.usage
            usage.num_drafted += len(draft)
            num_before, own = usage.num_accepted, list(islice(following, len(draft) + 1))
            for idx, row in enumerate(own):
                token_id = self._emit(sequence, row)
                if token_id is None or idx == len(draft) or token_id != draft[idx]:
                    break
                self._scheduler.accept(sequence)
                usage.num_accepted += 1
            assert self._drafter is not None
            num_accepted = usage.num_accepted - num_before
            self._drafter.observe_draft(sequence, num_drafted=len(draft), num_accepted=num_accepted)

    def _emit(self, sequence: LiveSequence, row: Row | TopRow) -> int | None:
        """Send a sequence's next event; return its token, None if it ended."""
        is_first = sequence.num_generated == 0
        try:
            event = sequence.next_event(row)
        except InvalidRequest as error:
            event = _failure(str(error))._replace(error_param=error.param)
        except BaseException as error:  # one request's failure, a panic in its grammar too, must not end its neighbours
            log.exception("request %s failed", sequence.request.request_id)
            event = _failure(f"{type(error).__name__}: {error}")
        if is_first and self._observer is not None and sequence.first_token_s is not None:
            self._observer.on_first_token(ttft_s=sequence.first_token_s - sequence.submitted_s)
        if event.finish_reason is not None:
            self._end(sequence, event)
            return None
        assert event.token_id is not None
        self._scheduler.set_next(sequence, event.token_id)
        sequence.request.sink(event)
        return event.token_id

    def _end(self, sequence: LiveSequence, event: TokenEvent) -> None:
        """Count the request and free its slot, then send its last event: all is done when the client sees it."""
        assert event.finish_reason is not None
        self._notify_end(
            sequence, event.finish_reason
        )  # while it is in `live`: if the observer raises, `fail` reaches it too
        if event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.observe(
                num_prompt=sequence.num_prompt,
                max_tokens=sequence.request.params.max_tokens,
                num_generated=sequence.num_generated,
            )
        self._scheduler.remove(sequence)
        del self.live[sequence.request.request_id]
        sequence.request.sink(event)

    def _expire(self, now_s: float) -> None:
        """End the requests whose time is up, and note when to look again."""
        for sequence in list(self.live.values()):
            if now_s >= sequence.deadline_s:
                self._end(sequence, _timed_out(sequence, now_s))
            elif now_s >= self._expiry_s(sequence):
                reason = f"no slot was free for {self._max_queue_wait_s:g} s (--max-queue-wait); try again later"
                self._end(sequence, TokenEvent(None, "", finish_reason=FinishReason.QUEUE_TIMEOUT, error=reason))
        self._next_expiry_s = min(map(self._expiry_s, self.live.values()), default=math.inf)

    def _expiry_s(self, sequence: LiveSequence) -> float:
        """When its time is up. A request in a slot no longer waits for one, nor does one that was preempted."""
        if sequence.slot is not None or sequence.num_preempted:
            return sequence.deadline_s
        return min(sequence.deadline_s, sequence.submitted_s + self._max_queue_wait_s)

    def _notify_end(self, sequence: LiveSequence, reason: FinishReason) -> None:
        if self._observer is not None:
            self._observer.on_finish(
                reason=reason,
                num_prompt=sequence.num_prompt,
                num_generated=sequence.num_generated,
                tpot_s=sequence.tpot_s(time.perf_counter()),
                usage=sequence.request.usage,
            )

    def _new_scheduler(self) -> Scheduler:
        cache = PrefixCache(self._session, self._prefix_cache)
        return Scheduler(
            self._session,
            cache,
            prefill_chunk=self._prefill_chunk,
            bounds=self._bounds,
            lengths=self._lengths,
            drafter=self._drafter,
        )


def _longest(info: SessionInfo) -> int:
    """Tokens of the longest request that has room, alone."""
    if info.kv_budget is None:
        return info.capacity
    return min(info.capacity, info.layout.fitting_tokens(info.kv_budget))


def _suffices(num_top: int, sequences: Iterable[LiveSequence]) -> bool:
    """Whether this many of the most likely tokens are enough for every one of them."""
    return all(sequence.num_top is not None and sequence.num_top <= num_top for sequence in sequences)


def _timed_out(sequence: LiveSequence, now_s: float) -> TokenEvent:
    passed_s = now_s - sequence.submitted_s
    reason = f"its time was up after {passed_s:.1f} s, with {sequence.num_generated} tokens generated; ask for fewer"
    return TokenEvent(None, "", finish_reason=FinishReason.TIMEOUT, error=reason)


def _failure(reason: str) -> TokenEvent:
    return TokenEvent(None, "", finish_reason=FinishReason.ERROR, error=reason)
