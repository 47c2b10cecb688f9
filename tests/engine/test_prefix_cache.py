"""The prefix cache: which prompts reuse which blocks, what is evicted first, and that salts keep clients apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import Request, RequestOptions, SamplingParams
from runtime.engine.engine import Engine
from runtime.engine.prefix_cache import BLOCK_LEN, PrefixCache, block_keys
from tests.support.fake_session import FakeSession
from tests.support.fake_text_model import fake_text_model

BLOCK_BYTES = BLOCK_LEN * 8
HEAD = [i % 50 for i in range(100)]


def ask(engine: Engine, prompt_ids: list[int], *, name: str = "r", salt: str = "") -> Request:
    params = SamplingParams(max_tokens=1, temperature=0)
    request = Request(
        request_id=name,
        prompt_ids=prompt_ids,
        params=params,
        eos_ids=frozenset(),
        sink=lambda event: None,
        options=RequestOptions(cache_salt=salt),
    )
    engine.add(engine.prepare(request))
    return request


def run(engine: Engine) -> int:
    """Finish everything; return how many prompt tokens were computed."""
    session = engine._session
    assert isinstance(session, FakeSession)
    session.batches.clear()
    while engine.has_work:
        engine.step()
    return sum(int(batch.query_len.sum()) for batch in session.batches)


def engine_with(max_bytes: int) -> Engine:
    return Engine(FakeSession(capacity=200), prefix_cache=max_bytes, prefill_chunk=64)


def test_a_prompt_reuses_the_whole_blocks_of_its_longest_known_beginning() -> None:
    engine = engine_with(10**6)
    ask(engine, [*HEAD, 1])
    assert run(engine) == 101
    for tail, num_cached in (([2, 3], 96), ([], 96), ([7] * 60, 96)):
        request = ask(engine, HEAD + tail)
        assert run(engine) == len(HEAD) + len(tail) - num_cached
        assert request.usage.num_cached == num_cached
    request = ask(engine, [*HEAD[:70], 49])
    run(engine)
    assert request.usage.num_cached == 64


@pytest.mark.parametrize(("length", "num_cached"), [(33, 0), (34, 32), (65, 32), (66, 64)])
def test_two_tokens_of_a_prompt_are_always_computed(length: int, num_cached: int) -> None:
    engine = engine_with(10**6)
    for _ in range(2):
        request = ask(engine, HEAD[:length])
        run(engine)
    assert request.usage.num_cached == num_cached


def test_the_second_of_two_prompts_that_arrive_together_reuses_the_first() -> None:
    engine = engine_with(10**6)
    first, second = ask(engine, HEAD, name="a"), ask(engine, [*HEAD, 1, 2], name="b")
    assert run(engine) == 100 + 6
    assert (first.usage.num_cached, second.usage.num_cached) == (0, 96)


def test_a_salt_hides_prompts_from_everybody_else() -> None:
    engine = engine_with(10**6)
    for salt, num_cached in (("mine", 0), ("yours", 0), ("", 0), ("mine", 96)):
        request = ask(engine, HEAD, salt=salt)
        assert run(engine) == 100 - num_cached
        assert request.usage.num_cached == num_cached


def test_without_memory_nothing_is_kept() -> None:
    for max_bytes in (0, BLOCK_BYTES - 1):
        engine = engine_with(max_bytes)
        for _ in range(2):
            ask(engine, HEAD)
            assert run(engine) == 100
        assert engine.stats().prefix_cache_bytes == 0


def test_the_beginning_that_was_not_used_for_longest_is_forgotten_and_its_end_first() -> None:
    engine = engine_with(5 * BLOCK_BYTES)
    old, new = HEAD, [49, *HEAD]
    for prompt, num_cached in ((old, 0), (new, 0), (old, 64), (old, 96), (new, 64)):
        request = ask(engine, prompt)
        run(engine)
        assert request.usage.num_cached == num_cached
        assert engine.stats().prefix_cache_bytes <= 5 * BLOCK_BYTES


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    engine = engine_with(2 * BLOCK_BYTES)
    for num_cached in (0, 64, 64):
        request = ask(engine, HEAD)
        run(engine)
        assert request.usage.num_cached == num_cached


@settings(max_examples=100, deadline=None)
@given(
    max_blocks=st.integers(0, 6),
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=30),
)
def test_a_block_outlives_those_that_continue_it(max_blocks: int, turns: list[tuple[int, int]]) -> None:
    session = FakeSession(num_slots=1, capacity=256)
    cache = PrefixCache(session, max_blocks * BLOCK_BYTES)
    chains = [block_keys([head] * 8 + [1] * 194, "") for head in range(4)]
    for head, length in turns:
        session.cache[0] = head
        num_restored = cache.restore(chains[head], 0, 0, length)
        assert num_restored <= length
        cache.keep(chains[head], 0, num_restored, length)
        assert cache.num_bytes == len(cache._blocks) * BLOCK_BYTES <= max_blocks * BLOCK_BYTES
        for keys in chains:
            known = [key in cache._blocks for key in keys]
            assert known == sorted(known, reverse=True)


def test_keys_depend_on_salt_on_every_token_before_and_on_nothing_after() -> None:
    keys = block_keys(HEAD, "")
    assert len(keys) == 3
    assert block_keys([*HEAD, 5, 6], "")[:3] == keys
    changed = block_keys([HEAD[0] + 1, *HEAD[1:]], "")
    assert not set(keys) & set(changed)
    assert not set(keys) & set(block_keys(HEAD, "x"))
    later = block_keys([*HEAD[:40], 49, *HEAD[41:]], "")
    assert later[0] == keys[0] and later[1] != keys[1] and later[2] != keys[2]


def test_the_second_choice_of_a_request_and_its_next_turn_report_what_they_reused() -> None:
    model = fake_text_model(capacity=256, prefix_cache=10**6)
    model.start()
    try:
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        prompt = np.arange(70).tolist()
        seen = []
        for salt in ("a", "a", "b"):
            generation = model.generate(prompt, params, options=RequestOptions(cache_salt=salt))
            answer = [event.token_id for event in generation]
            seen.append((generation.usage.num_cached, answer))
        assert [cached for cached, _ in seen] == [0, 64, 0]
        assert seen[0][1] == seen[1][1] == seen[2][1]
    finally:
        model.close()


@pytest.mark.parametrize(("prefill_chunk", "num_cached"), [(32, 192), (64, 192), (48, 192), (128, 128), (50, 0)])
def test_where_cuts_matter_whole_chunks_are_reused(prefill_chunk: int, num_cached: int) -> None:
    session = FakeSession(capacity=256, is_cut_exact=False)
    engine = Engine(session, prefix_cache=10**6, prefill_chunk=prefill_chunk)
    prompt = [i % 50 for i in range(200)]
    for _ in range(2):
        request = ask(engine, prompt)
        run(engine)
    assert request.usage.num_cached == num_cached
    assert all(batch.past_len[0] % prefill_chunk == 0 for batch in session.batches)


def test_a_long_beginning_is_copied_over_several_steps_and_none_of_it_computed() -> None:
    engine = Engine(FakeSession(num_slots=2, capacity=700), prefix_cache=10**6, prefill_chunk=8)
    prompt = [i % 50 for i in range(640)]
    ask(engine, prompt)
    assert run(engine) == 640
    request = ask(engine, prompt)
    engine.step()
    assert request.usage.num_cached == 128  # 16 tokens copied for each that may be computed
    assert run(engine) == 32
    assert request.usage.num_cached == 608
