"""Memory of the KV cache by what is really taken: admission, preemption, and that nobody is lost or starves."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import FinishReason, RequestOptions, SamplingParams
from runtime.engine.answer_lengths import FIRST_GUESS, MIN_SEEN, WINDOW, AnswerLengths
from runtime.engine.engine import Engine
from runtime.engine.kv_slots import KEEP_TOKENS, KvSlots
from runtime.engine.planning.kv_memory import order_of
from runtime.engine.sequence import LiveSequence
from runtime.engine.speculation.speculator import Speculator
from runtime.errors import PromptTooLong
from tests.support.engine_requests import (
    CAPACITY,
    VOCAB,
    Recorder,
    add,
    alone,
    check_cache,
    check_memory,
    check_slots,
    greedy,
    make_request,
    scores_of,
)
from tests.support.fake_session import LAYOUT, FakeSession

PAGE = LAYOUT.step_bytes
"""What a slot commits for four more tokens."""

NUM_REQUESTS = 120
"""On each of three memories; benchmarks/kv_memory.py sends 10,000."""

HEAD = [(5 * i) % VOCAB for i in range(70)]


def pages(num_tokens: int) -> int:
    return LAYOUT.committed(num_tokens)


class Oldest:
    """Watches that the oldest running request gets on: by a token cached or generated, at least every few steps."""

    PATIENCE = 3

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: tuple[str, int] = ("", 0)
        self._num_still = 0

    def check(self) -> None:
        running = [s for s in self._engine.live.values() if s.slot is not None]
        if not running:
            return
        oldest = min(running, key=order_of)
        assert not any(
            order_of(s) < order_of(oldest) and s.request.options.priority == oldest.request.options.priority
            for s in self._engine.live.values()
            if s.num_preempted and s.slot is None
        ), "a request was preempted for a younger one"
        done = int(self._engine._scheduler.slots.past_len[oldest.slot]) + oldest.num_generated
        now = (oldest.request.request_id, done)
        self._num_still = self._num_still + 1 if now == self._seen else 0
        self._seen = now
        assert self._num_still < self.PATIENCE


@st.composite
def asked(draw: st.DrawFn) -> tuple[int, list[int], SamplingParams, int]:
    """Steps until it comes, prompt, parameters, priority."""
    head = HEAD[: draw(st.integers(0, len(HEAD)))]
    prompt = head + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
    params = SamplingParams(
        max_tokens=draw(st.one_of(st.integers(1, 40), st.just(CAPACITY - len(prompt)))),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 5)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logprobs=draw(st.sampled_from([None, 1])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        stop_token_ids=draw(st.sampled_from([frozenset[int](), frozenset(range(0, VOCAB, 9))])),
    )
    return draw(st.integers(0, 12)), prompt, params, draw(st.sampled_from([0, 0, 0, 1]))


@settings(max_examples=40, deadline=None)
@given(
    is_sparse=st.booleans(),
    is_run_exact=st.booleans(),
    is_cut_exact=st.booleans(),
    prefix_cache=st.sampled_from([0, 1000, 100_000]),
    is_drafting=st.booleans(),
    num_slots=st.integers(1, 6),
    prefill_chunk=st.integers(2, 40),
    spare_pages=st.integers(0, 60),
    requests=st.lists(asked(), min_size=1, max_size=12),
)
def test_whatever_the_memory_every_request_gets_what_it_gets_alone(
    is_sparse: bool,
    is_run_exact: bool,
    is_cut_exact: bool,
    prefix_cache: int,
    is_drafting: bool,
    num_slots: int,
    prefill_chunk: int,
    spare_pages: int,
    requests: list[tuple[int, list[int], SamplingParams, int]],
) -> None:
    budget = max(pages(len(prompt) + params.max_tokens) for _, prompt, params, _ in requests) + spare_pages * PAGE
    session = FakeSession(
        num_slots=num_slots,
        capacity=CAPACITY,
        vocab_size=VOCAB,
        is_sparse=is_sparse,
        is_run_exact=is_run_exact,
        is_cut_exact=is_cut_exact,
        kv_budget=budget,
    )
    drafter = Speculator(min_gain=0.0) if is_drafting else None
    engine = Engine(session, prefill_chunk=prefill_chunk, prefix_cache=prefix_cache, drafter=drafter)
    oldest, recorders, step = Oldest(engine), dict[str, Recorder](), 0
    pending = {f"r{idx}": item for idx, item in enumerate(requests)}
    while pending or engine.has_work:
        for name, (delay, prompt, params, priority) in list(pending.items()):
            if delay <= step:
                recorders[name] = add(engine, name, prompt, params, options=RequestOptions(priority=priority))
                del pending[name]
        if engine.has_work:
            engine.step()
        check_slots(engine)
        check_memory(engine, session)
        check_cache(engine, prefix_cache)
        oldest.check()
        step += 1
        assert step < 3000, "somebody starves"
    for name, (_, prompt, params, _) in zip(recorders, [requests[int(name[1:])] for name in recorders], strict=True):
        assert recorders[name].events == alone(prompt, params)


def preempting(num_requests: int = 3, **options: Any) -> tuple[FakeSession, Engine, list[Recorder]]:
    """An engine in which short answers were expected, and all become long: memory for one and a half."""
    session = FakeSession(num_slots=4, capacity=64, kv_budget=pages(64) + pages(30), **options)
    engine = Engine(session, prefill_chunk=16)
    for _ in range(MIN_SEEN):
        engine._lengths.observe(num_prompt=1, max_tokens=40, num_generated=1)
    return session, engine, [add(engine, f"r{idx}", [idx + 1] * 20, greedy(40)) for idx in range(num_requests)]


@pytest.mark.parametrize("is_run_exact", [False, True])
def test_the_youngest_is_preempted_and_computed_again(is_run_exact: bool) -> None:
    session, engine, recorders = preempting(is_run_exact=is_run_exact)
    while not engine.stats().num_preempted:
        engine.step()
        check_memory(engine, session)
    (victim,) = [s for s in engine.live.values() if s.num_preempted]
    assert victim.request.request_id == "r2" and victim.slot is None
    num_before = len(recorders[2].token_ids)
    assert 0 < num_before < 40
    while engine.has_work:
        engine.step()
    assert [r.token_ids for r in recorders] == [
        [e.token_id for e in alone_in(64, [idx + 1] * 20, greedy(40))] for idx in range(3)
    ]
    assert engine.stats().num_preempted >= 1 and engine.stats().kv_used_bytes == 0


def alone_in(capacity: int, prompt: list[int], params: SamplingParams) -> list[Any]:
    engine = Engine(FakeSession(num_slots=1, capacity=capacity), prefill_chunk=capacity)
    recorder = add(engine, "alone", prompt, params)
    while engine.has_work:
        engine.step()
    return recorder.events


def test_generated_tokens_run_one_by_one_unless_runs_are_exact() -> None:
    """A session whose runs of one token round otherwise must see the same runs again."""
    for is_run_exact in (False, True):
        _, engine, recorders = preempting(is_run_exact=is_run_exact)
        while not engine.stats().num_preempted:
            engine.step()
        num_generated = len(recorders[2].token_ids)
        (victim,) = [s for s in engine.live.values() if s.num_preempted]
        assert victim.num_fill == (20 + num_generated if is_run_exact else 20)
        assert list(victim.fill_ids) == [3] * 20 + recorders[2].token_ids
        while engine.has_work:
            engine.step()


def test_who_was_preempted_does_not_wait_for_a_slot_again() -> None:
    """--max-queue-wait is for those that never had a slot."""
    session = FakeSession(num_slots=4, capacity=64, kv_budget=pages(64) + pages(30))
    engine = Engine(session, prefill_chunk=16, max_queue_wait_s=0.0)
    for _ in range(MIN_SEEN):
        engine._lengths.observe(num_prompt=1, max_tokens=40, num_generated=1)
    engine._max_queue_wait_s = 1000.0
    recorders = [add(engine, f"r{idx}", [idx + 1] * 20, greedy(40)) for idx in range(3)]
    while not engine.stats().num_preempted:
        engine.step()
    engine._max_queue_wait_s = 0.0
    engine._next_expiry_s = 0.0
    while engine.has_work:
        engine.step()
        engine._next_expiry_s = 0.0
    assert [r.reason for r in recorders] == [FinishReason.LENGTH] * 3


def test_the_prefix_cache_gives_way_before_anybody_is_preempted() -> None:
    session = FakeSession(num_slots=2, capacity=200, kv_budget=pages(200))
    engine = Engine(session, prefill_chunk=64, prefix_cache=10**6)
    add(engine, "first", HEAD, greedy(1))
    while engine.has_work:
        engine.step()
    assert engine.stats().prefix_cache_bytes == 2 * 32 * 8 == engine.stats().kv_used_bytes
    long = add(engine, "long", [9] * 150, greedy(50))
    while engine.has_work:
        engine.step()
        check_memory(engine, session)
    assert long.reason is FinishReason.LENGTH and engine.stats().num_preempted == 0
    assert engine.stats().prefix_cache_bytes <= 1600 - pages(199)


def test_the_prefix_cache_leaves_what_was_granted_to_later_runs_of_a_step() -> None:
    """Two prompts in runs of their own. Blocks of the first must not fill the memory that the second has been given."""
    session = FakeSession(num_slots=2, capacity=160, is_ragged=False, kv_budget=pages(70) + pages(70))
    engine = Engine(session, prefill_chunk=140, prefix_cache=10**6)
    for idx in range(2):
        add(engine, str(idx), [idx + 1] * 69, greedy(1))
    used = []
    session._on_run = lambda batch: used.append(engine._scheduler.memory.used)
    engine.step()
    assert len(used) == 2 and used[1] + pages(69) <= engine.info.kv_bytes
    check_memory(engine, session)


def test_a_scored_prompt_is_scored_once() -> None:
    session = FakeSession(num_slots=2, capacity=64, kv_budget=pages(64) + pages(8))
    engine = Engine(session, prefill_chunk=8)
    for _ in range(MIN_SEEN):
        engine._lengths.observe(num_prompt=1, max_tokens=30, num_generated=1)
    scored = SamplingParams(max_tokens=20, temperature=0, prompt_logprobs=1)
    old = add(engine, "old", [1, 2, 3], greedy(60))
    young = add(engine, "young", [4] * 30, scored)
    while engine.has_work:
        engine.step()
    assert engine.stats().num_preempted
    expected = alone_in(64, [4] * 30, scored)
    assert young.events == expected and scores_of(young.events) == scores_of(expected)
    assert old.token_ids == [e.token_id for e in alone_in(64, [1, 2, 3], greedy(60))]


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    engine = Engine(FakeSession(num_slots=2, capacity=CAPACITY, kv_budget=pages(40)))
    assert engine.max_len == 40
    with pytest.raises(
        PromptTooLong, match=r"320 bytes of KV memory.*holds 40 tokens of the 160 .*requested 41 tokens"
    ):
        add(engine, "x", [1] * 21, greedy(20))
    recorder = add(engine, "y", [1] * 20, greedy(20))
    while engine.has_work:
        engine.step()
    assert recorder.reason is FinishReason.LENGTH


def test_requests_without_a_limit_do_not_reserve_the_context() -> None:
    """Four of them at once, each of which could use all of the memory."""
    session = FakeSession(num_slots=4, capacity=CAPACITY, vocab_size=VOCAB, kv_budget=pages(CAPACITY))
    engine = Engine(session, prefill_chunk=64)
    for _ in range(MIN_SEEN):
        engine._lengths.observe(num_prompt=10, max_tokens=CAPACITY - 10, num_generated=20)
    params = SamplingParams(max_tokens=CAPACITY - 10, temperature=0, stop_token_ids=frozenset(range(0, VOCAB, 12)))
    recorders = [add(engine, f"r{idx}", [idx] * 10, params) for idx in range(4)]
    engine.step()
    assert engine.stats().num_running == 4
    while engine.has_work:
        engine.step()
    assert [r.events for r in recorders] == [alone([idx] * 10, params) for idx in range(4)]


def test_who_waits_for_memory_is_not_overtaken() -> None:
    session = FakeSession(num_slots=4, capacity=64, kv_budget=pages(64))
    engine = Engine(session, prefill_chunk=64)
    first = add(engine, "first", [1] * 20, greedy(20))
    large, small = add(engine, "large", [2] * 30, greedy(30)), add(engine, "small", [3], greedy(1))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 2)
    while engine.has_work:
        engine.step()
        assert large.events or not small.events or first.is_done
    assert large.is_done and small.is_done and engine.stats().num_preempted == 0


def test_slots_keep_pages_for_the_next_request_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    slots = KvSlots(3, 10_000, layout=LAYOUT, drop=dropped.append)
    first, second, third = slots.take(), slots.take(), slots.take()
    for slot, num in ((first, 8), (second, KEEP_TOKENS + 1), (third, 4)):
        slots.past_len[slot] = num
        slots.fill(slot)
    slots.release(first)
    slots.release(second)
    assert dropped == [second], "a long one's pages go back at once"
    assert slots.committed == pages(8) + pages(4)
    assert slots.take() == first and not slots.drop_kept()
    assert slots.past_len[first] == 0 and slots.committed == pages(8) + pages(4), "they are there for the next one"
    slots.release(first)
    assert not slots.drop_kept(older_than_s=60) and slots.drop_kept() and dropped == [second, first]
    slots.release(third)
    assert dropped == [second, first, third] and slots.committed == 0, "with the last one all go back"


def test_answer_lengths_are_learned_by_kind() -> None:
    lengths = AnswerLengths(1000)
    plain: dict[str, int] = {"num_prompt": 100, "max_tokens": 200}
    unlimited: dict[str, int] = {"num_prompt": 100, "max_tokens": 900}
    assert lengths.expected(**plain) == 200 and lengths.expected(**unlimited) == FIRST_GUESS
    for num in range(WINDOW):
        lengths.observe(**plain, num_generated=50)
        lengths.observe(**unlimited, num_generated=num % 100)
    assert lengths.expected(**plain) == 50 and lengths.expected(num_prompt=1, max_tokens=40) == 10
    assert 85 <= lengths.expected(**unlimited) <= 95
    assert 95 <= lengths.expected(**unlimited, num_generated=90) <= 99
    assert lengths.expected(**unlimited, num_generated=99) == FIRST_GUESS, "longer than any before it"
    assert lengths.expected(**unlimited, num_generated=400) == 500
    assert lengths.expected(**unlimited, num_generated=899) == 900
    for _ in range(WINDOW):
        lengths.observe(**plain, num_generated=200)
    assert lengths.expected(**plain) == 200, "what was long ago counts no more"


def test_the_order_of_requests_is_fixed_by_priority_and_first_admission() -> None:
    rows = []
    for priority, idx in ((1, 0), (0, 5), (0, 2)):
        request, _ = make_request(str(idx), [1], greedy(1))
        request.options = RequestOptions(priority=priority)
        sequence = LiveSequence(request)
        sequence.admission_idx = idx
        rows.append(sequence)
    assert [s.admission_idx for s in sorted(rows, key=order_of)] == [2, 5, 0]


def test_hundreds_of_requests_on_little_memory() -> None:
    """Random lengths; the memory changes between three engines. None is lost, and each gets its tokens."""
    rng = np.random.default_rng(15)
    num_preempted = 0
    for budget_tokens in (CAPACITY, 220, 400):
        session = FakeSession(
            num_slots=16, capacity=CAPACITY, vocab_size=VOCAB, memory=3, kv_budget=pages(budget_tokens)
        )
        engine = Engine(session, prefill_chunk=32, prefix_cache=2000)
        oldest, recorders = Oldest(engine), list[tuple[list[int], SamplingParams, Recorder]]()
        while len(recorders) < NUM_REQUESTS or engine.has_work:
            for _ in range(rng.integers(0, 3) if len(recorders) < NUM_REQUESTS else 0):
                prompt = rng.integers(0, VOCAB, rng.integers(1, 60)).tolist()
                is_open = rng.random() < 0.3
                params = SamplingParams(
                    max_tokens=CAPACITY - len(prompt) if is_open else int(rng.integers(1, 60)),
                    temperature=0.0 if rng.random() < 0.5 else 1.0,
                    seed=int(rng.integers(0, 100)),
                    stop_token_ids=frozenset(range(3)) if is_open else frozenset(),
                )
                recorders.append((prompt, params, add(engine, str(len(recorders)), prompt, params)))
            engine.step()
            check_slots(engine)
            check_memory(engine, session)
            oldest.check()
        num_preempted += engine.stats().num_preempted
        for prompt, params, recorder in recorders:
            assert recorder.reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert recorder.events == alone(prompt, params, memory=3)
    assert num_preempted > 5
