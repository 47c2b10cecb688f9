"""Requests for the engine's tests, sinks that keep their events, and the invariants that hold after every step."""

from typing import Any

import numpy as np

from runtime.core import DEFAULT_OPTIONS, FinishReason, Request, RequestOptions, SamplingParams, TokenEvent
from runtime.engine.engine import Engine
from runtime.session.session import Session
from tests.support.fake_session import FakeSession, prefix_logits

CAPACITY, VOCAB = 160, 50
"""Of the fake session that `alone` runs on."""

CHUNK = 16
"""Prompt tokens a step, for `requests`."""


class Recorder:
    """Collects the events of one request and checks that nothing follows the last."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []

    def __call__(self, event: TokenEvent) -> None:
        assert not self.is_done
        self.events.append(event)

    @property
    def is_done(self) -> bool:
        return bool(self.events) and self.events[-1].finish_reason is not None

    @property
    def token_ids(self) -> list[int]:
        return [e.token_id for e in self.events if e.token_id is not None]

    @property
    def reason(self) -> FinishReason | None:
        return self.events[-1].finish_reason if self.events else None


def make_request(
    request_id: str, prompt_ids: list[int], params: SamplingParams, eos_ids: frozenset[int] = frozenset()
) -> tuple[Request, Recorder]:
    recorder = Recorder()
    request = Request(request_id=request_id, prompt_ids=prompt_ids, params=params, eos_ids=eos_ids, sink=recorder)
    return request, recorder


def add(
    engine: Engine,
    request_id: str,
    prompt_ids: list[int],
    params: SamplingParams,
    *,
    options: RequestOptions = DEFAULT_OPTIONS,
) -> Recorder:
    request, recorder = make_request(request_id, prompt_ids, params)
    request.options = options
    engine.add(engine.prepare(request))
    return recorder


def alone(
    prompt_ids: list[int],
    params: SamplingParams,
    eos_ids: frozenset[int] = frozenset(),
    *,
    memory: int | None = None,
) -> list[TokenEvent]:
    """What a request gets with a session to itself, its prompt in one chunk, no cache and no drafts."""
    session = FakeSession(num_slots=1, capacity=CAPACITY, vocab_size=VOCAB, memory=memory)
    engine = Engine(session, prefill_chunk=CAPACITY)
    request, recorder = make_request("alone", prompt_ids, params, eos_ids)
    engine.add(engine.prepare(request))
    while engine.has_work:
        engine.step()
    return recorder.events


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


def expected_logprob(prefix: list[int], token_id: int, vocab_size: int) -> float:
    """Log-probability that the fake session gives a token after a prefix."""
    row = prefix_logits(np.array(prefix), vocab_size).astype(np.float64)
    return float(row[token_id] - row.max() - np.log(np.exp(row - row.max()).sum()))


def check_slots(engine: Engine) -> None:
    """free + used == total, and each running sequence holds one slot of its own."""
    slots = engine._scheduler.slots
    assert slots.num_free + slots.num_used == slots.num_slots
    held = [s.slot for s in engine.live.values() if s.slot is not None]
    assert len(set(held)) == len(held) == slots.num_used
    free = set(range(slots.num_slots)) - set(held)
    assert all(slots.past_len[slot] == 0 for slot in free)
    for sequence in engine.live.values():
        if sequence.slot is not None:
            # The last token chosen is not in the cache before the next step.
            most = sequence.num_prompt + max(0, sequence.num_generated - 1)
            assert slots.past_len[sequence.slot] <= most


def check_memory(engine: Engine, session: FakeSession) -> None:
    """The ledger is what the session has really committed, and within the budget; what is accepted fits alone."""
    slots, memory = engine._scheduler.slots, engine._scheduler.memory
    assert (slots.filled == session.touched).all()
    assert (slots.filled >= slots.past_len).all()
    assert memory.used == slots.layout.all_committed(session.touched) + engine._scheduler.cache.num_bytes
    if memory.budget is not None:
        assert memory.used <= memory.budget and memory.used + (memory.free or 0) == memory.budget
    if not slots.num_used:
        assert not slots.filled.any(), "an idle engine keeps no memory of slots"


def check_cache(engine: Engine, max_bytes: int) -> None:
    """The memory bound holds, and no block is kept without those before it: nobody could find it."""
    cache = engine._scheduler.cache
    assert cache.num_bytes == sum(rows.nbytes for rows in cache._blocks.values()) <= max_bytes
    for sequence in engine.live.values():
        known = [key in cache._blocks for key in sequence.prefix_keys]
        assert known == sorted(known, reverse=True)


def scores_of(events: list[TokenEvent]) -> list[float]:
    (scored,) = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert events[0].prompt_logprobs is not None and events[0].token_id is None, "before the first token"
    return [item.logprob for item in scored]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of one token to several chunks, greedy and sampled with every filter, short and long answers."""
    rng = np.random.default_rng(7)
    out = []
    for idx, length in enumerate((1, 3, 15, 16, 17, 40, 70, 5, 33, 2, 64, 9)):
        settings: dict[str, Any] = {"temperature": 0.0} if idx % 2 else {"temperature": 1.0, "top_p": 0.9, "seed": idx}
        if idx % 3 == 0:
            settings |= {"repetition_penalty": 1.2, "logprobs": 2}
        out.append((rng.integers(3, 320, length).tolist(), SamplingParams(max_tokens=3 + 5 * (idx % 6), **settings)))
    return out


class Collected(list[TokenEvent]):
    """A sink that keeps what it gets."""

    def tokens(self) -> list[tuple[int | None, float | None]]:
        assert self[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return [(event.token_id, event.logprob) for event in self]


def submit(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> Collected:
    sink = Collected()
    engine.add(
        engine.prepare(
            Request(request_id=name, prompt_ids=prompt, params=params, eos_ids=frozenset({2}), sink=sink.append)
        )
    )
    return sink


def alike() -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings of 0 to 100 tokens, cut everywhere."""
    rng = np.random.default_rng(8)
    head = rng.integers(3, 320, 100).tolist()
    sampled = SamplingParams(max_tokens=9, temperature=0.8, seed=4, logprobs=1)
    plain = SamplingParams(max_tokens=9, temperature=0, logprobs=1)
    lengths = (100, 100, 64, 66, 33, 34, 97, 31, 80, 100)
    return [
        (head[:length] + rng.integers(3, 320, idx % 4).tolist(), sampled if idx % 2 else plain)
        for idx, length in enumerate(lengths)
    ]


Asked = list[tuple[list[int], SamplingParams]]


Tokens = list[list[tuple[int | None, float | None]]]


def each_alone(session: Session, asked: Asked, prefill_chunk: int = CHUNK) -> Tokens:
    """What each request gets from an engine of its own."""
    tokens = []
    for idx, (prompt, params) in enumerate(asked):
        engine = Engine(session, prefill_chunk=prefill_chunk)
        sink = submit(engine, str(idx), prompt, params)
        while engine.has_work:
            engine.step()
        tokens.append(sink.tokens())
    return tokens


def together(engine: Engine, asked: Asked) -> Tokens:
    """What they get from one engine, three joining at every step."""
    sinks = []
    for idx, (prompt, params) in enumerate(asked):
        sinks.append(submit(engine, str(idx), prompt, params))
        if idx % 3 == 2:
            engine.step()
    while engine.has_work:
        engine.step()
    return [sink.tokens() for sink in sinks]
