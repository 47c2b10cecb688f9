"""The order of requests: priorities, turns of long and short prompts, time limits."""

import time

import pytest

from runtime.core import FinishReason, RequestOptions
from runtime.engine.engine import Engine
from runtime.errors import InvalidRequest
from tests.support.engine_requests import Recorder, add, greedy
from tests.support.fake_session import FakeSession

CHUNK = 16
PASSED = RequestOptions(timeout_s=1e-9)
"""A time limit that is up at the next step."""


def steps_until(recorder: Recorder, engine: Engine) -> int:
    steps = 0
    while not recorder.events:
        engine.step()
        steps += 1
    return steps


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one() -> None:
    for offset in range(3):
        engine = Engine(FakeSession(num_slots=4, capacity=400), prefill_chunk=CHUNK)
        long = add(engine, "long", [1] * 300, greedy(2))
        for _ in range(offset):
            engine.step()
        short = add(engine, "short", [2] * 10, greedy(2))
        assert steps_until(short, engine) <= 2
        assert not long.events


def test_a_long_prompt_gets_every_other_step_however_many_short_ones_come() -> None:
    engine = Engine(FakeSession(num_slots=4, capacity=400), prefill_chunk=CHUNK)
    long = add(engine, "long", [1] * 160, greedy(2))
    steps = 0
    while not long.events:
        add(engine, f"short {steps}", [2] * 16, greedy(1))
        engine.step()
        steps += 1
    assert steps <= 20  # 10 chunks


def test_running_streams_get_a_token_a_step_whatever_is_prefilled_and_the_cache_gives() -> None:
    engine = Engine(FakeSession(num_slots=4, capacity=400), prefill_chunk=CHUNK, prefix_cache=10**6)
    for round_idx in range(2):
        stream = add(engine, f"stream {round_idx}", [3], greedy(100))
        engine.step()
        add(engine, f"a {round_idx}", [1] * 390, greedy(1))
        add(engine, f"b {round_idx}", [1] * 390, greedy(1))
        for num_tokens in range(2, 101):
            engine.step()
            assert len(stream.events) == num_tokens


def test_the_waiting_are_served_by_priority_then_in_order() -> None:
    engine = Engine(FakeSession(num_slots=1))
    recorders = {}
    for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 0), ("e", -5)):
        recorders[name] = add(engine, name, [1], greedy(1), options=RequestOptions(priority=priority))
    order: list[str] = []
    while engine.has_work:
        engine.step()
        order += [name for name, recorder in recorders.items() if recorder.is_done and name not in order]
    assert order == ["c", "e", "a", "d", "b"]


def test_of_two_prompts_in_slots_the_more_urgent_is_prefilled_first() -> None:
    engine = Engine(FakeSession(num_slots=2, capacity=400), prefill_chunk=CHUNK)
    idle = add(engine, "idle", [1] * 64, greedy(2), options=RequestOptions(priority=1))
    engine.step()
    urgent = add(engine, "urgent", [2] * 160, greedy(2))
    assert steps_until(urgent, engine) == 10
    assert not idle.events


def test_a_request_ends_when_its_time_is_up_wherever_it_is() -> None:
    engine = Engine(FakeSession(num_slots=2), prefill_chunk=4)
    kept = add(engine, "kept", [1], greedy(9), options=RequestOptions(timeout_s=1000))
    prefilling = add(engine, "prefilling", [2] * 30, greedy(9))
    engine.step()
    engine.live["prefilling"].deadline_s = time.perf_counter()
    waiting = add(engine, "waiting", [3], greedy(9), options=PASSED)
    engine._next_expiry_s = 0
    engine.step()
    assert prefilling.reason is waiting.reason is FinishReason.TIMEOUT
    assert "0 tokens" in (waiting.events[-1].error or "")
    while engine.has_work:
        engine.step()
    assert kept.reason is FinishReason.LENGTH
    assert engine.stats().num_running == 0


def test_a_request_that_waits_too_long_for_a_slot_fails_and_one_that_has_a_slot_does_not() -> None:
    engine = Engine(FakeSession(num_slots=1), max_queue_wait_s=0.01)
    running = add(engine, "running", [1], greedy(5))
    engine.step()
    waiting = add(engine, "waiting", [2], greedy(5))
    time.sleep(0.02)
    engine.step()
    assert waiting.reason is FinishReason.QUEUE_TIMEOUT
    assert "--max-queue-wait" in (waiting.events[-1].error or "")
    while engine.has_work:
        engine.step()
    assert running.reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"priority": 101}, "priority must be at least -100 and at most 100"),
        ({"timeout_s": 0}, "timeout must be greater than 0"),
        ({"timeout_s": float("nan")}, "timeout must be a finite number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        RequestOptions(**options)  # type: ignore[arg-type]
