"""A failure in each step of the engine's loop: which requests fail, with which reason, and which continue."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.core import FinishReason, Request, SamplingParams, TextPiece
from runtime.engine.engine import Engine
from runtime.engine.sampling.sampler import SampledToken
from runtime.engine.speculation.speculator import Speculator
from runtime.engine.thread import EngineThread
from runtime.errors import Unavailable
from runtime.session.session import Batch, KvRows, TopRow
from tests.support.engine_requests import VOCAB, Recorder, alone, greedy, make_request
from tests.support.fake_session import FakeSession

LONG_WAIT_S = 30.0
HEAD = [(3 * i) % VOCAB for i in range(70)]


class FailingSession(FakeSession):
    """Raises in one of its methods once `is_armed`, or in a run that `spoils` picks."""

    def __init__(self, where: str, spoils: Callable[[Batch], bool] = lambda batch: True) -> None:
        # Rows move down only when nobody waits for the free slot.
        super().__init__(num_slots=4 if where == "copy_slot" else 3, capacity=160, vocab_size=VOCAB, memory=1)
        self.where = where
        self.spoils = spoils
        self.is_armed = False

    def _fail(self, where: str) -> None:
        if self.is_armed and self.where == where:
            raise OSError(f"broken in {where}")

    def run(self, batch: Batch) -> NDArray[np.float32]:
        if self.spoils(batch):
            self._fail("run")
        return super().run(batch)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        self._fail("copy_slot")
        super().copy_slot(source, target, num_tokens)

    def read_slot(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        self._fail("read_slot")
        return super().read_slot(slot, start, stop)

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        self._fail("write_slot")
        super().write_slot(slot, start, rows)


def is_prefill(batch: Batch) -> bool:
    return not batch.past_len.all()


def is_verification(batch: Batch) -> bool:
    return len(batch.logits_idx) > int((batch.query_len > 0).sum())


class BrokenSpeculator(Speculator):
    """Cannot say what to draft."""

    def draft(self, *args: Any) -> list[list[int]] | None:
        raise OSError("broken in draft")


@pytest.mark.parametrize(
    ("session", "speculator"),
    [
        (FailingSession("run", is_prefill), Speculator(min_gain=0)),
        (FailingSession("run", lambda batch: not is_prefill(batch)), Speculator(min_gain=0)),
        (FailingSession("run", is_verification), Speculator(min_gain=0)),
        (FailingSession("copy_slot"), Speculator(min_gain=0)),
        (FailingSession("read_slot"), Speculator(min_gain=0)),
        (FailingSession("write_slot"), Speculator(min_gain=0)),
        (FailingSession("nothing"), BrokenSpeculator()),
    ],
    ids=["prefill", "decode", "verification", "compaction", "store", "restore", "draft"],
)
def test_what_breaks_the_engine_ends_every_request_with_the_reason_and_readiness(
    session: FailingSession, speculator: Speculator
) -> None:
    engine = Engine(session, prefill_chunk=32, prefix_cache=10**6, drafter=speculator)
    thread = EngineThread(engine, max_waiting=10)
    if isinstance(speculator, BrokenSpeculator):
        engine._scheduler._decode._drafter = None
    pairs = [make_request("short", [5], greedy(2)), make_request("long", HEAD, greedy(60))]
    pairs += [make_request("other", [*HEAD[:40], 1], greedy(60)), make_request("waiting", HEAD, greedy(60))]
    # All are in the inbox when the thread starts; what fails is armed when the first token comes.
    first_sink = pairs[0][0].sink

    def arm(event: Any) -> None:
        session.is_armed = True
        if isinstance(speculator, BrokenSpeculator):
            engine._scheduler._decode._drafter = speculator
        first_sink(event)

    pairs[0][0].sink = arm
    thread._is_accepting = True
    for request, _ in pairs:
        thread.submit(request)
    thread.start()
    thread._thread.join(LONG_WAIT_S)
    assert not thread.is_ready
    assert "broken in" in (thread.failure or "")
    for _, recorder in pairs[1:]:
        assert recorder.reason is FinishReason.ERROR
        assert recorder.events[-1].error == thread.failure
    with pytest.raises(Unavailable, match="broken in"):
        thread.submit(make_request("late", [1], greedy(1))[0])
    assert thread.drain(LONG_WAIT_S)
    thread.close()


class SpoiledSession(FakeSession):
    """Gives NaN for rows that begin with `poison`, from the position `after` on."""

    poison, after = 13, 0

    def _logits_at(self, batch: Batch, row: int, position: int) -> NDArray[np.float32]:
        logits = super()._logits_at(batch, row, position)
        if self.cache[batch.first_slot + row, 0] == self.poison and batch.past_len[row] + position >= self.after:
            logits[:] = np.nan
        return logits


class BrokenText:
    """Fails at its n-th token."""

    def __init__(self, fails_at: int) -> None:
        self._left = fails_at

    def push(self, token_id: int) -> TextPiece:
        self._left -= 1
        if not self._left:
            raise ValueError("no such word")
        return TextPiece("x", False)

    def finish(self, end_id: int | None = None) -> str:
        return ""


class BrokenSampler:
    """Fails at its n-th row."""

    def __init__(self, fails_at: int) -> None:
        self._left = fails_at

    def sample(self, row: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> SampledToken:
        self._left -= 1
        if not self._left:
            raise ZeroDivisionError("nothing left to choose from")
        return SampledToken(int(row.argmax()))

    def sample_top(self, top: TopRow) -> SampledToken:
        raise AssertionError("no session here picks the most likely tokens")


@pytest.mark.parametrize("fails_at", [1, 2, 7, 20])
@pytest.mark.parametrize("what", ["logits", "text", "sampler"])
def test_what_breaks_one_request_ends_that_one_within_a_draft_too(what: str, fails_at: int) -> None:
    prompt = [13, 2, 13, 2]
    session = SpoiledSession(num_slots=3, capacity=160, vocab_size=VOCAB, memory=1)
    session.after = len(prompt) + fails_at - 2 if what == "logits" else 1000
    engine = Engine(session, drafter=Speculator(min_gain=0), prefix_cache=10**6)
    bad, recorder = make_request("bad", prompt, greedy(30))
    if what == "text":
        bad.text = BrokenText(fails_at)
    sequence = engine.prepare(bad)
    if what == "sampler":
        sequence._sampler = BrokenSampler(fails_at)
    engine.add(sequence)
    others = {name: _add(engine, name, ids) for name, ids in (("a", [1, 2]), ("b", HEAD), ("later", [4]))}
    while engine.has_work:
        engine.step()
    expected = [event.token_id for event in alone(prompt, greedy(30), memory=1)]
    assert recorder.reason is FinishReason.ERROR
    assert recorder.token_ids == expected[: fails_at - 1]
    reasons = {"logits": "nan", "text": "ValueError: no such word", "sampler": "ZeroDivisionError"}
    assert reasons[what] in (recorder.events[-1].error or "")
    for name, ids in (("a", [1, 2]), ("b", HEAD), ("later", [4])):
        assert others[name].events == alone(ids, greedy(40), memory=1)
    assert engine.stats().num_running == 0


def _add(engine: Engine, name: str, ids: list[int]) -> Recorder:
    request, recorder = make_request(name, ids, greedy(40))
    engine.add(engine.prepare(request))
    return recorder


class FullSession(FakeSession):
    """Has no memory left for copies after the first."""

    def read_slot(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        if start:
            raise MemoryError
        return super().read_slot(slot, start, stop)


def test_no_memory_for_the_prefix_cache_costs_no_request() -> None:
    engine = Engine(FullSession(capacity=160, vocab_size=VOCAB), prefix_cache=10**6)
    params = SamplingParams(max_tokens=3, temperature=0)
    requests: list[Request] = []
    for name in ("a", "b"):
        request, recorder = make_request(name, HEAD, params)
        requests.append(request)
        engine.add(engine.prepare(request))
        while engine.has_work:
            engine.step()
        assert recorder.events == alone(HEAD, params)
    assert requests[1].usage.num_cached == 32
