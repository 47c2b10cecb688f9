"""The text model on a fake session and a byte tokenizer: threads, overload, failure, drain, cancelling."""

import threading

import pytest

from runtime.core import Constraint, ConstraintKind, FinishReason, SamplingParams, TokenEvent
from runtime.engine.engine import Engine
from runtime.engine.thread import EngineThread
from runtime.errors import InvalidRequest, Overloaded, PromptTooLong, Unavailable
from runtime.session.session import Batch
from runtime.settings import EngineSettings
from runtime.text.model_text import ModelText
from runtime.text_model import ModelFacts, TextModel
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.engine_requests import make_request
from tests.support.fake_session import FakeSession
from tests.support.fake_text_model import VOCAB_SIZE, greedy_to_the_end, running

LONG_WAIT_S = 30.0
"""Far beyond what any of this takes: only a bug waits so long."""


class Gate:
    """Holds the session before each run until it is opened; `entered` is set when a run has come to it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self._open.wait(LONG_WAIT_S)

    def open(self) -> None:
        self._open.set()


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_many_threads_get_the_tokens_they_get_alone() -> None:
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=1)) as model:
        expected = [list(model.generate(p, greedy_to_the_end(10))) for p in prompts]
    results: dict[int, list[TokenEvent]] = {}
    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=5)) as model:

        def ask(i: int) -> None:
            results[i] = list(model.generate(prompts[i], greedy_to_the_end(10)))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_WAIT_S)
    assert [results[i] for i in range(len(prompts))] == expected
    assert all([e.finish_reason for e in events[:-1]] == [None] * 9 for events in expected)


def test_pieces_add_up_to_the_text_and_a_stop_string_cuts_it() -> None:
    with running(FakeSession(vocab_size=VOCAB_SIZE)) as model:
        events = list(model.generate([1, 2], greedy_to_the_end(40)))
        whole = byte_tokenizer().decode([e.token_id for e in events if e.token_id is not None])
        assert text_of(events) == whole
        stop = whole[10:13]
        cut = list(model.generate([1, 2], greedy_to_the_end(40, stop=(stop,))))
        assert text_of(cut) == whole[: whole.index(stop)]
        assert cut[-1].finish_reason is FinishReason.STOP


def test_an_eos_token_ends_the_answer_without_text() -> None:
    biased = SamplingParams(max_tokens=9, temperature=0, logit_bias={257: 100})
    with running(FakeSession(vocab_size=VOCAB_SIZE)) as model:
        (event,) = model.generate([1], biased)
    assert event == TokenEvent(257, "", finish_reason=FinishReason.STOP)


def test_one_request_too_many_is_refused() -> None:
    gate = Gate()
    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=2, on_run=gate), max_waiting=1) as model:
        accepted = [model.generate([1], greedy_to_the_end(2)) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 requests") as caught:
            model.generate([1], greedy_to_the_end(2))
        assert caught.value.retry_after >= 1
        gate.open()
        assert [list(g)[-1].finish_reason for g in accepted] == [FinishReason.LENGTH] * 3
        assert list(model.generate([1], greedy_to_the_end(2)))


class Panic(BaseException):
    """What PyO3 makes of a panic in Rust is no Exception either."""


@pytest.mark.parametrize("kind", [MemoryError, Panic, SystemExit, KeyboardInterrupt])
def test_an_engine_failure_reaches_every_request_and_later_ones_are_refused(kind: type[BaseException]) -> None:
    gate = Gate()

    def fail(batch: Batch) -> None:
        gate(batch)
        raise kind("out of cache")

    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, on_run=fail)) as model:
        requests = [model.generate([1], greedy_to_the_end(2)) for _ in range(3)]
        assert model.is_ready
        gate.open()
        for request in requests:
            (event,) = request
            assert event.finish_reason is FinishReason.ERROR
            assert event.error == f"the engine failed: {kind.__name__}: out of cache"
        assert not model.is_ready
        assert model.failure == f"the engine failed: {kind.__name__}: out of cache"
        with pytest.raises(Unavailable, match="out of cache"):
            model.generate([1], greedy_to_the_end(2))
        assert model.drain(LONG_WAIT_S)


def test_a_panic_in_the_thread_that_computes_masks_ends_one_request() -> None:
    """Of a whole run: the grammar's own request hears of it, the other one has all its tokens."""

    def panic(*_: object) -> None:
        raise Panic("in a mask")

    constraint = Constraint(ConstraintKind.REGEX, "[a-z]{30}", param="structured_outputs")
    with running(FakeSession(vocab_size=VOCAB_SIZE)) as model:
        held = model.generate([1], SamplingParams(max_tokens=20, temperature=0, constraint=constraint))
        assert list(held)[-1].finish_reason is FinishReason.LENGTH
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("runtime.grammar.guide.mask_of", panic)
            held = model.generate([1], SamplingParams(max_tokens=20, temperature=0, constraint=constraint))
            other = model.generate([2], greedy_to_the_end(20))
            last = list(held)[-1]
            assert (last.finish_reason, last.error) == (FinishReason.ERROR, "Panic: in a mask")
            assert list(other)[-1].finish_reason is FinishReason.LENGTH
        assert model.is_ready and model.failure is None


def test_a_cancellation_on_its_way_does_not_save_the_engine_from_failing_cleanly() -> None:
    gate = Gate()

    def fail(batch: Batch) -> None:
        gate(batch)
        raise MemoryError("out of cache")

    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, on_run=fail)) as model:
        first, second = model.generate([1], greedy_to_the_end(2)), model.generate([2], greedy_to_the_end(2))
        assert gate.entered.wait(LONG_WAIT_S)
        late = model.generate([3], greedy_to_the_end(2))
        first.close()
        gate.open()
        assert [list(g)[-1].finish_reason for g in (first, second, late)] == [FinishReason.ERROR] * 3
        first.close()


def test_drain_lets_what_runs_finish() -> None:
    gate = Gate()
    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, on_run=gate)) as model:
        requests = [model.generate([1], greedy_to_the_end(5)) for _ in range(3)]
        threading.Timer(0.05, gate.open).start()
        assert model.drain(LONG_WAIT_S)
        assert [list(r)[-1].finish_reason for r in requests] == [FinishReason.LENGTH] * 3
        assert not model.is_ready
        with pytest.raises(Unavailable, match="shutting down"):
            model.generate([1], greedy_to_the_end(2))


def test_drain_cancels_what_does_not_finish_in_time() -> None:
    gate = Gate()
    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, on_run=gate)) as model:
        requests = [model.generate([1], greedy_to_the_end(5)) for _ in range(3)]
        assert gate.entered.wait(LONG_WAIT_S)
        threading.Timer(0.2, gate.open).start()
        assert not model.drain(0.01)
        assert [list(r)[-1].finish_reason for r in requests] == [FinishReason.CANCELLED] * 3


def test_closing_a_generation_cancels_it_and_frees_its_slot() -> None:
    gate = Gate()
    with running(FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, on_run=gate)) as model:
        with model.generate([1], greedy_to_the_end(50)) as closed:
            assert gate.entered.wait(LONG_WAIT_S)
            closed.close()
            closed.close()
        after = model.generate([2], greedy_to_the_end(3))
        gate.open()
        assert list(closed)[-1].finish_reason is FinishReason.CANCELLED
        assert list(after)[-1].finish_reason is FinishReason.LENGTH
        assert model.drain(LONG_WAIT_S)
        assert tuple(model.stats()) == (0, 0, 1, 0, 64, 512, 512, 0, 0)


def test_closing_the_model_ends_every_generation() -> None:
    gate = Gate()
    session = FakeSession(vocab_size=VOCAB_SIZE, num_slots=1, on_run=gate)
    with running(session) as model:
        requests = [model.generate([1], greedy_to_the_end(50)) for _ in range(3)]
        assert gate.entered.wait(LONG_WAIT_S)
        threading.Timer(0.05, gate.open).start()
    assert [list(r)[-1].finish_reason for r in requests] == [FinishReason.CANCELLED] * 3


def test_next_event_gives_none_while_there_is_nothing_and_the_last_event_for_ever() -> None:
    gate = Gate()
    with running(FakeSession(vocab_size=VOCAB_SIZE, on_run=gate)) as model:
        generation = model.generate([1], greedy_to_the_end(1))
        assert generation.prompt_tokens == 1
        assert generation.next_event(0.01) is None
        gate.open()
        last = generation.next_event(LONG_WAIT_S)
        assert last is not None and last.finish_reason is FinishReason.LENGTH
        assert generation.next_event(0) is last
        assert list(generation) == []


def test_a_request_id_in_use_is_refused_until_it_is_free() -> None:
    gate = Gate()
    with running(FakeSession(vocab_size=VOCAB_SIZE, on_run=gate)) as model:
        first = model.generate([1], greedy_to_the_end(1), request_id="mine")
        with pytest.raises(InvalidRequest, match="'mine' is in use"):
            model.generate([1], greedy_to_the_end(1), request_id="mine")
        gate.open()
        assert list(first)
        assert list(model.generate([1], greedy_to_the_end(1), request_id="mine"))


def test_bad_requests_are_refused_before_they_are_queued() -> None:
    with running(FakeSession(vocab_size=VOCAB_SIZE, capacity=10)) as model:
        for params in (
            SamplingParams(logit_bias={VOCAB_SIZE: 1.0}, max_tokens=1),
            SamplingParams(stop_token_ids=frozenset({-1}), max_tokens=1),
        ):
            with pytest.raises(InvalidRequest, match="not in the vocabulary"):
                model.generate([1], params)
        with pytest.raises(InvalidRequest, match="empty"):
            model.generate([], greedy_to_the_end(1))
        with pytest.raises(PromptTooLong, match="10 tokens"):
            model.generate([1] * 10, greedy_to_the_end(1))
        assert model.stats().num_waiting == 0


def test_a_model_that_is_not_started_is_unavailable() -> None:
    session, settings = FakeSession(vocab_size=VOCAB_SIZE), EngineSettings()
    text = ModelText(byte_tokenizer(), None, settings, vocab_size=VOCAB_SIZE, eos_ids=frozenset())
    model = TextModel(ModelFacts("fake", frozenset(), "fp32"), session=session, text=text, settings=settings)
    with pytest.raises(Unavailable, match="starting"):
        model.generate([1], greedy_to_the_end(1))
    assert model.describe() == "4 slots of 64 tokens, 2.0 kB of KV memory, fp32, on fake"
    model.close()
    model.close()


def test_chat_needs_a_template_and_uses_it() -> None:
    messages = [{"role": "user", "content": "hé"}]
    with (
        running(FakeSession(vocab_size=VOCAB_SIZE)) as model,
        pytest.raises(InvalidRequest, match="no chat template"),
    ):
        model.encode_chat(messages)
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    with running(FakeSession(vocab_size=VOCAB_SIZE), template=template) as model:
        ids = model.encode_chat(messages)
        assert (ids[0], ids[-1]) == (256, 257)
        assert b"".join(model.token_bytes(i) for i in ids).decode() == "hé"
        assert model.token_text(257) == "<|end|>"


def test_an_abandoned_reply_may_be_closed_in_the_middle_of_anything() -> None:
    """The garbage collector runs on whatever thread allocates, also on one that holds the inbox's lock."""
    thread = EngineThread(Engine(FakeSession(num_slots=1)), max_waiting=8)

    class Meddler(str):
        """An id that, looked at, has a cancellation put in, as a collected reply does."""

        def __eq__(self, other: object) -> bool:
            thread.cancel("abandoned")
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    thread._is_accepting = True  # without its thread: nothing empties the inbox
    for name in (Meddler("a"), Meddler("b")):
        thread.submit(make_request(name, [1], greedy_to_the_end(1))[0])
    with pytest.raises(InvalidRequest, match="request id 'b' is in use"):
        thread.submit(make_request("b", [1], greedy_to_the_end(1))[0])
    thread.submit(make_request("c", [1], greedy_to_the_end(1))[0])
    assert thread.stats().num_waiting == 3
