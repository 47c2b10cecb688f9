"""The engine on a fake session: random traces, fairness, cancellation, failure of one request."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.core import (
    FinishReason,
    SamplingParams,
    TextPiece,
    Usage,
)
from runtime.engine.engine import Engine
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.speculator import Speculator
from runtime.errors import InvalidRequest, PromptTooLong
from runtime.session.session import Batch, TopRows
from tests.support.engine_requests import (
    CAPACITY,
    VOCAB,
    Recorder,
    add,
    alone,
    check_cache,
    check_slots,
    greedy,
    make_request,
)
from tests.support.fake_session import FakeSession

HEADS = [[(7 * i + 3 * j) % VOCAB for j in range(100)] for i in range(3)]
"""Long beginnings that prompts of a trace have in common."""


def check_batches(session: FakeSession) -> None:
    """Every row of a decode span belongs to somebody: after compaction no free slot lies inside it."""
    for batch in session.batches:
        assert batch.query_len.any()
        if batch.token_ids.shape[1] == 1 and batch.first_slot == 0 and session.info.is_ragged:
            assert batch.query_len[-1] == 1


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=draw(st.integers(1, 25)),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 5)),
        stop_token_ids=draw(st.sampled_from([frozenset[int](), frozenset(range(0, VOCAB, 7))])),
        logprobs=draw(st.sampled_from([None, 2])),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    head = draw(st.sampled_from([[], *HEADS]))
    tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
    return head[: draw(st.integers(0, len(head)))] + tail


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["ragged", "sparse", "full rows"]),
    prefix_cache=st.sampled_from([0, 600, 100_000]),  # bytes: none, two blocks, all
    min_gain=st.sampled_from([None, 0.0, 1.0]),  # no drafts, every draft, those that pay in a fake session's time
    memory=st.sampled_from([None, 1, 2]),
    draft_memory=st.sampled_from([None, 1, 2]),  # of a draft model; None: there is none
    num_slots=st.integers(1, 5),
    prefill_chunk=st.integers(1, 40),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 12),  # steps before it arrives
            prompts(),
            sampling(),
            st.one_of(st.none(), st.integers(0, 15)),  # steps until it is cancelled
        ),
        min_size=1,
        max_size=9,
    ),
)
def test_random_traces_give_every_request_what_it_gets_alone(
    kind: str,
    prefix_cache: int,
    min_gain: float | None,
    memory: int | None,
    draft_memory: int | None,
    num_slots: int,
    prefill_chunk: int,
    arrivals: list[tuple[int, list[int], SamplingParams, int | None]],
) -> None:
    session = FakeSession(
        num_slots=num_slots,
        capacity=CAPACITY,
        vocab_size=VOCAB,
        is_ragged=kind != "full rows",
        is_sparse=kind == "sparse",
        memory=memory,
    )
    draft_model = None
    if draft_memory is not None:
        draft_session = FakeSession(num_slots=num_slots, capacity=CAPACITY, vocab_size=VOCAB, memory=draft_memory)
        draft_model = DraftModel(draft_session, prefill_chunk=20)
    speculator = None if min_gain is None else Speculator(draft_model, min_gain=min_gain)
    engine = Engine(session, prefill_chunk=prefill_chunk, prefix_cache=prefix_cache, drafter=speculator)
    recorders: dict[str, Recorder] = {}
    pending = {f"r{i}": item for i, item in enumerate(arrivals)}
    cancel_at: dict[str, int] = {}
    eos_ids = frozenset({3})
    step = 0
    while pending or engine.has_work:
        for request_id, (delay, prompt_ids, params, lifetime) in list(pending.items()):
            if delay <= step:
                request, recorders[request_id] = make_request(request_id, prompt_ids, params, eos_ids)
                engine.add(engine.prepare(request))
                del pending[request_id]
                if lifetime is not None:
                    cancel_at[request_id] = step + lifetime
        for request_id, when in cancel_at.items():
            if when == step:
                engine.cancel(request_id)
        check_slots(engine)
        if engine.has_work:
            engine.step()
        check_slots(engine)
        check_cache(engine, prefix_cache)
        if speculator is not None:
            assert speculator._draft_model is draft_model, "it failed"
        step += 1
        assert step < 1000
    check_batches(session)
    assert not (session.info.is_sparse and session.copies), "a sparse session has nothing to gain from it"
    assert engine._scheduler.slots.num_free == num_slots
    assert not engine.live
    for request_id, recorder in recorders.items():
        _, prompt_ids, params, _ = arrivals[int(request_id[1:])]
        expected = alone(prompt_ids, params, eos_ids, memory=memory)
        assert recorder.is_done
        if recorder.reason is FinishReason.CANCELLED:
            assert recorder.events[:-1] == expected[: len(recorder.events) - 1]
        else:
            assert recorder.events == expected


@pytest.mark.parametrize("is_ragged", [True, False])
def test_running_streams_get_a_token_every_step_while_a_long_prompt_arrives(is_ragged: bool) -> None:
    session = FakeSession(num_slots=4, capacity=4200, is_ragged=is_ragged)
    engine = Engine(session, prefill_chunk=512)
    streams = [add(engine, f"s{i}", [i + 1], greedy(100)) for i in range(3)]
    engine.step()
    long = add(engine, "long", [i % VOCAB for i in range(4000)], greedy(5))
    steps = 0
    while not long.events:
        before = [len(s.events) for s in streams]
        engine.step()
        steps += 1
        assert [len(s.events) for s in streams] == [n + 1 for n in before]
    assert steps == 8  # 4,000 tokens in chunks of 512
    assert [b.token_ids.size for b in session.batches if b.token_ids.size > 4] == [500] * 8


def test_the_first_token_comes_in_the_step_of_the_last_chunk() -> None:
    engine = Engine(FakeSession(), prefill_chunk=10)
    recorder = add(engine, "a", list(range(25)), greedy(3))
    for expected in (0, 0, 1, 2, 3):
        engine.step()
        assert len(recorder.events) == expected
    assert recorder.reason is FinishReason.LENGTH


def test_a_budget_of_prompt_tokens_is_filled_and_pieces_are_even() -> None:
    for num_prompts, length, runs in ((32, 70, 18), (1, 154, 2)):
        session = FakeSession(num_slots=32, capacity=200)
        engine = Engine(session, prefill_chunk=128)
        recorders = [add(engine, str(i), [i] * length, greedy(1)) for i in range(num_prompts)]
        while engine.has_work:
            engine.step()
        sizes = [int(batch.query_len.sum()) for batch in session.batches]
        assert len(sizes) == runs and max(sizes) - min(sizes) <= 5, sizes
        for i, recorder in enumerate(recorders):
            assert recorder.events == alone([i] * length, greedy(1))


def test_prompts_share_a_ragged_run_as_far_as_the_chunk_goes_but_not_with_a_single_token() -> None:
    session = FakeSession(num_slots=5)
    engine = Engine(session, prefill_chunk=24)
    for name, length in (("a", 10), ("b", 9), ("c", 2), ("d", 1)):
        add(engine, name, [1] * length, greedy(2))
    engine.step()
    assert [b.query_len.tolist() for b in session.batches] == [[10, 9, 2], [1]]


def test_prompts_of_any_slots_share_a_run_of_a_sparse_session_and_no_row_moves() -> None:
    session = FakeSession(num_slots=5, is_sparse=True)
    engine = Engine(session, prefill_chunk=24)
    for name, length, num_new in (("a", 2, 1), ("b", 2, 9), ("c", 2, 1), ("d", 2, 9)):
        add(engine, name, [1] * length, greedy(num_new))
    engine.step()
    for name in ("e", "f"):  # they take the slots of "a" and "c"
        add(engine, name, [2] * 12, greedy(1))
    engine.step()
    assert session.batches[-1].query_len.tolist() == [12, 0, 12]
    while engine.has_work:
        engine.step()
    assert not session.copies


def test_padding_is_bounded_for_it_takes_memory() -> None:
    session = FakeSession(num_slots=5)
    engine = Engine(session, prefill_chunk=24)
    for name, length in (("a", 14), ("b", 2), ("c", 2), ("d", 2), ("e", 2)):
        add(engine, name, [1] * length, greedy(2))
    engine.step()
    assert [b.query_len.tolist() for b in session.batches] == [[14, 2, 2], [2, 2]]


def test_a_session_that_is_not_ragged_prefills_row_by_row_and_decodes_over_prompts_in_between() -> None:
    session = FakeSession(num_slots=3, is_ragged=False)
    engine = Engine(session, prefill_chunk=4)
    first = add(engine, "first", [7] * 2, greedy(6))
    add(engine, "short", [7] * 2, greedy(1))
    last = add(engine, "last", [7] * 2, greedy(6))
    long = add(engine, "long", [7] * 30, greedy(6))  # takes the slot of `short`, between the other two
    while engine.has_work:
        engine.step()
    spans = [b for b in session.batches if b.token_ids.shape == (3, 1)]
    assert any(0 < b.past_len[1] < 30 for b in spans)
    assert first.token_ids == last.token_ids == [e.token_id for e in alone([7] * 2, greedy(6))]
    assert long.token_ids == [e.token_id for e in alone([7] * 30, greedy(6))]


def test_a_row_moves_down_when_a_lower_slot_is_free_and_nobody_waits() -> None:
    session = FakeSession(num_slots=3)
    engine = Engine(session)
    add(engine, "a", [1], greedy(2))
    add(engine, "b", [2], greedy(2))
    kept = add(engine, "c", [3], greedy(8))
    while engine.has_work:
        engine.step()
    assert session.copies == [(2, 0, 2)]
    assert session.batches[-1].token_ids.shape == (1, 1)
    assert kept.events == alone([3], greedy(8))


def test_a_long_row_moves_only_after_idle_rows_have_cost_as_much_and_not_if_the_gap_is_filled() -> None:
    for is_filled in (False, True):
        session = FakeSession(num_slots=3, capacity=400)
        engine = Engine(session, prefill_chunk=400)
        add(engine, "a", [1], greedy(2))
        add(engine, "b", [2] * 20, greedy(30))
        kept = add(engine, "c", [3] * 120, greedy(30))
        engine.step()
        engine.step()  # "a" ends
        engine.step()
        assert engine.live["c"].slot == 2
        if is_filled:
            add(engine, "d", [4], greedy(40))
        while engine.has_work:
            engine.step()
        assert session.copies == ([] if is_filled else [(2, 0, 123)])
        assert kept.events == alone([3] * 120, greedy(30))


def test_a_freed_slot_goes_to_who_waits_before_rows_move() -> None:
    session = FakeSession(num_slots=2)
    engine = Engine(session)
    add(engine, "a", [1], greedy(2))
    add(engine, "b", [2], greedy(9))
    add(engine, "c", [3], greedy(9))
    for _ in range(4):
        engine.step()
    assert session.copies == []
    assert engine.live["c"].slot == 0


def test_cancelling_frees_the_slot_at_the_next_boundary() -> None:
    session = FakeSession(num_slots=1)
    engine = Engine(session)
    first = add(engine, "a", [1], greedy(20))
    second = add(engine, "b", [2], greedy(1))
    engine.step()
    assert second.events == []
    engine.cancel("a")
    assert first.reason is FinishReason.CANCELLED
    assert engine.stats().num_running == 0
    engine.step()
    assert second.reason is FinishReason.LENGTH


def test_cancelling_works_while_waiting_and_during_prefill_and_twice() -> None:
    engine = Engine(FakeSession(num_slots=1), prefill_chunk=4)
    prefilling = add(engine, "a", [1] * 20, greedy(3))
    waiting = add(engine, "b", [2], greedy(3))
    engine.step()
    for name in ("b", "a", "a", "unknown"):
        engine.cancel(name)
    assert [prefilling.reason, waiting.reason] == [FinishReason.CANCELLED] * 2
    assert not engine.has_work


def test_prompt_and_answer_must_fit_and_the_message_gives_both_numbers() -> None:
    engine = Engine(FakeSession(capacity=10))
    fits, _ = make_request("fits", [1] * 7, greedy(3))
    engine.prepare(fits)
    over, _ = make_request("over", [1] * 8, greedy(3))
    with pytest.raises(PromptTooLong, match=r"10 tokens.*11 tokens \(8 in the prompt, 3 for"):
        engine.prepare(over)


@pytest.mark.parametrize(("prompt_ids", "match"), [([], "empty"), ([1, 50], "50"), ([-1], "-1")])
def test_prompts_outside_the_vocabulary_are_refused(prompt_ids: list[int], match: str) -> None:
    request, _ = make_request("r", prompt_ids, greedy(1))
    with pytest.raises(InvalidRequest, match=match):
        Engine(FakeSession(vocab_size=50)).prepare(request)


class NanSession(FakeSession):
    """Returns NaN for the rows whose prompt began with `poison`."""

    poison = 13

    def _logits_at(self, batch: Batch, row: int, position: int) -> NDArray[np.float32]:
        logits = super()._logits_at(batch, row, position)
        if self.cache[batch.first_slot + row, 0] == self.poison:
            logits[5] = np.nan
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_end_that_request_alone(temperature: float) -> None:
    params = replace(greedy(4), temperature=temperature, seed=1)
    engine = Engine(NanSession(vocab_size=VOCAB))
    bad, good = add(engine, "bad", [13], params), add(engine, "good", [1], params)
    while engine.has_work:
        engine.step()
    assert bad.reason is FinishReason.ERROR
    assert "nan" in (bad.events[-1].error or "")
    assert good.events == alone([1], params)


class BrokenObserver:
    """Fails when it hears that a request ended."""

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        pass

    def on_first_token(self, *, ttft_s: float) -> None:
        pass

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        raise OSError("disk full")


def test_every_request_hears_of_a_failure_even_if_the_observer_is_what_failed() -> None:
    engine = Engine(FakeSession(num_slots=1), observer=BrokenObserver())
    recorders = [add(engine, name, [1], greedy(3)) for name in ("running", "waiting", "last")]
    engine.step()
    with pytest.raises(OSError, match="disk full"):
        engine.fail("broken")
    assert [r.events[-1].error for r in recorders] == ["broken"] * 3
    assert engine.stats().num_running == 0
    assert not engine.has_work


def test_a_request_whose_end_cannot_be_counted_still_hears_of_it() -> None:
    engine = Engine(FakeSession(), observer=BrokenObserver())
    recorder = add(engine, "only", [1], greedy(1))
    with pytest.raises(OSError, match="disk full"):
        engine.step()
    with pytest.raises(OSError, match="disk full"):
        engine.fail("broken")
    assert [event.error for event in recorder.events] == ["broken"]


class BrokenText:
    """A text stream that fails on its second token."""

    def __init__(self) -> None:
        self.num_pushed = 0

    def push(self, token_id: int) -> TextPiece:
        self.num_pushed += 1
        if self.num_pushed == 2:
            raise ValueError("no such word")
        return TextPiece("x", False)

    def finish(self, end_id: int | None = None) -> str:
        return ""


def test_a_text_error_ends_that_request_alone() -> None:
    engine = Engine(FakeSession(vocab_size=VOCAB))
    request, bad = make_request("bad", [2], greedy(5))
    request.text = BrokenText()
    engine.add(engine.prepare(request))
    good = add(engine, "good", [1], greedy(5))
    while engine.has_work:
        engine.step()
    assert [e.finish_reason for e in bad.events] == [None, FinishReason.ERROR]
    assert bad.events[-1].error == "ValueError: no such word"
    assert good.events == alone([1], greedy(5))


class Observer:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.ttfts: list[float] = []
        self.ends: list[tuple[FinishReason, int, int, bool]] = []

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        assert 0 <= model_s <= step_s
        self.steps.append((num_decode, num_prefill_tokens))

    def on_first_token(self, *, ttft_s: float) -> None:
        self.ttfts.append(ttft_s)

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        self.ends.append((reason, num_prompt, num_generated, tpot_s is None))


def test_the_observer_hears_steps_first_tokens_and_ends() -> None:
    observer = Observer()
    engine = Engine(FakeSession(), prefill_chunk=8, observer=observer)
    add(engine, "a", [1] * 12, greedy(3))
    add(engine, "b", [2], greedy(1))
    while engine.has_work:
        engine.step()
    assert observer.steps == [(0, 7), (0, 6), (1, 0), (1, 0)]
    assert len(observer.ttfts) == 2 and min(observer.ttfts) >= 0
    assert observer.ends == [(FinishReason.LENGTH, 1, 1, True), (FinishReason.LENGTH, 12, 3, False)]


def test_who_has_the_answer_finds_it_counted() -> None:
    observer, counted = Observer(), list[int]()
    engine = Engine(FakeSession(), observer=observer)
    request, _ = make_request("a", [1], greedy(2))
    request.sink = lambda event: counted.append(len(observer.ends))
    engine.add(engine.prepare(request))
    while engine.has_work:
        engine.step()
    assert counted == [0, 1]


class TopFakeSession(FakeSession):
    """A session that picks the most likely tokens itself, as TensorRT's does."""

    num_top = 4

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_top_runs = 0

    def run_top(self, batch: Batch) -> TopRows:
        self.num_top_runs += 1
        logits = self.run(batch)
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, : self.num_top]
        log_sums = np.log(np.exp(logits.astype(np.float64)).sum(-1)).astype(np.float32)
        return TopRows(np.take_along_axis(logits, ids, -1), ids, log_sums)


@pytest.mark.parametrize(("min_tokens", "num_top_runs"), [(0, 20), (6, 14)])
def test_whole_rows_are_copied_only_until_an_answer_may_end(min_tokens: int, num_top_runs: int) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, min_tokens=min_tokens)
    session = TopFakeSession(num_slots=1, capacity=CAPACITY, vocab_size=VOCAB)
    engine = Engine(session)
    request, recorder = make_request("a", [1, 2, 3], params, frozenset([VOCAB - 1]))
    engine.add(engine.prepare(request))
    while engine.has_work:
        engine.step()
    assert recorder.token_ids == [event.token_id for event in alone([1, 2, 3], params, frozenset([VOCAB - 1]))]
    assert len(recorder.token_ids) == 20 and session.num_top_runs == num_top_runs
