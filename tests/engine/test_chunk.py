"""How many prompt tokens a step takes: what the latency bounds leave time for, by a cost that is learned."""

import pytest

from runtime.engine.engine import Engine
from runtime.engine.planning.chunk import FASTEST, LEAST, UNMEASURED, ChunkSize, LatencyBounds, PendingPrompt, Piece
from runtime.engine.planning.chunk import PrefillCost as Cost
from runtime.session.session import Batch
from tests.support.engine_requests import add, alone, greedy
from tests.support.fake_session import FakeSession

BOUNDS = LatencyBounds(ttft_s=1.0, tpot_s=0.2)
TOKEN_S, RUN_S, PAIR_S = 0.001, 0.012, 0.0004
"""Of a machine that runs 1,000 tokens a second, and whose runs have a cost of their own."""


def seconds_of(pieces: list[Piece]) -> float:
    return RUN_S + sum(num * (TOKEN_S + PAIR_S * (past + num / 2) / 1024) for num, past in pieces)


def measured(token_s: float = 1.0) -> ChunkSize:
    """Of a machine that is so many times as slow."""
    chunk = ChunkSize(BOUNDS)
    for num in (512, 100, 40, 300, 512, 154) * 5:
        chunk.observe([Piece(num)], token_s * seconds_of([Piece(num)]))
    return chunk


def prompts(num: int, length: int, age_s: float = 0.0) -> list[PendingPrompt]:
    return [PendingPrompt(Piece(length), length, age_s)] * num


def test_the_cost_of_a_run_is_learned_and_follows_a_machine_that_becomes_slower() -> None:
    cost = Cost()
    runs = [[Piece(512)], [Piece(70)] * 3, [Piece(128, 3000)], [Piece(32)], [Piece(100, 9000)], [Piece(200)]]
    for slowness in (1.0, 3.0):
        for _ in range(40):
            for pieces in runs:
                cost.observe(pieces, slowness * seconds_of(pieces))
        for pieces in runs:
            assert cost.seconds(pieces) == pytest.approx(slowness * seconds_of(pieces), rel=0.15)


def test_one_interrupted_run_changes_little() -> None:
    cost = Cost()
    for _ in range(9):
        cost.observe([Piece(128)], 0.1)
    cost.observe([Piece(128)], 60.0)
    assert cost.seconds([Piece(128)]) < 0.14


def test_without_streams_a_step_is_as_fast_as_it_can_be_and_holds_no_newcomer_up_for_long() -> None:
    assert ChunkSize(BOUNDS).of_step(prompts(9, 400), has_streams=False, elapsed_s=0) == FASTEST
    assert 440 < measured().of_step(prompts(9, 400), has_streams=False, elapsed_s=0) < 500
    assert 35 < measured(10).of_step(prompts(9, 400), has_streams=False, elapsed_s=0) < 50


def test_beside_streams_a_step_keeps_their_bound() -> None:
    long = prompts(1, 100_000)
    assert ChunkSize(BOUNDS).of_step(long, has_streams=True, elapsed_s=0) == UNMEASURED
    chunk = measured()
    for elapsed_s in (0.01, 0.06, 0.1):
        num = chunk.of_step(long, has_streams=True, elapsed_s=elapsed_s)
        assert elapsed_s + seconds_of([Piece(num)]) == pytest.approx(BOUNDS.tpot_s, rel=0.1)
    assert chunk.of_step(long, has_streams=True, elapsed_s=0.3) == LEAST, "a prompt must get on"


def test_a_prompt_with_much_before_it_gets_smaller_pieces() -> None:
    chunk = measured()
    for _ in range(30):
        chunk.observe([Piece(64, 20_000)], seconds_of([Piece(64, 20_000)]))
    pending = [PendingPrompt(Piece(5000, 20_000), 25_000, 0.0)]
    num = chunk.of_step(pending, has_streams=True, elapsed_s=0.05)
    assert LEAST <= num < 40
    assert seconds_of([Piece(num, 20_000)]) < 0.4


def test_streams_wait_longer_where_prompts_would_be_late_that_can_be_in_time() -> None:
    chunk = measured()

    def size(pending: list[PendingPrompt]) -> int:
        return chunk.of_step(pending, has_streams=True, elapsed_s=0.06)

    usual = size(prompts(1, 150))
    assert size(prompts(4, 100)) == size(prompts(1, 150, age_s=0.5)) == usual
    assert size(prompts(32, 150)) > 2 * usual, "too many"
    assert size(prompts(1, 150, age_s=0.9)) > 2 * usual, "waited for a slot"
    assert size(prompts(1, 100_000, age_s=99)) == usual, "no stream pauses for a prompt that is long anyway"
    assert size([*prompts(1, 100_000), *prompts(1, 150)]) == usual


def test_a_fixed_chunk_is_kept_whatever_the_bounds_and_a_device_has_its_own_limit() -> None:
    fixed = ChunkSize(BOUNDS, fixed=300)
    fixed.observe([Piece(300)], 99.0)
    assert fixed.of_step(prompts(9, 400), has_streams=True, elapsed_s=9) == 300
    assert ChunkSize(BOUNDS, limit=64).of_step(prompts(9, 400), has_streams=False, elapsed_s=0) == 64


@pytest.mark.parametrize("is_cut_exact", [True, False])
def test_the_engine_gives_the_same_tokens_whatever_the_clock_says(is_cut_exact: bool) -> None:
    """Without a fixed chunk; a real clock cuts prompts differently at every run."""
    lengths = (300, 5, 2, 64, 700, 1, 130, 257)
    batches: list[Batch] = []
    session = FakeSession(num_slots=4, capacity=1000, is_cut_exact=is_cut_exact, on_run=batches.append)
    engine = Engine(session, prefix_cache=10**6)
    recorders = [add(engine, str(i), [i + 1] * length, greedy(5)) for i, length in enumerate(lengths)]
    while engine.has_work:
        engine.step()
    for i, (length, recorder) in enumerate(zip(lengths, recorders, strict=True)):
        if length < 150:
            assert recorder.events == alone([i + 1] * length, greedy(5))
        assert len(recorder.token_ids) == 5
    prefills = [batch for batch in batches if batch.token_ids.shape[1] > 1]
    assert max(int(batch.query_len.sum()) for batch in prefills) <= FASTEST
    if not is_cut_exact:
        assert all(batch.past_len[batch.query_len > 0].max() % 128 == 0 for batch in prefills)
