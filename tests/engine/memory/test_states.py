"""Models whose slots hold states beside K and V: nothing reaches a state from a slot's last request, from padding, idle
rows or other rows; what would have to cut a state back is switched off."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.native_session import open_cpu_session
from runtime.backends.ort.pools import HostPool
from runtime.backends.ort.session import OrtSession
from runtime.core import SamplingParams
from runtime.engine.answer_lengths import MIN_SEEN
from runtime.engine.engine import Engine
from runtime.engine.prefix_cache import BLOCK_LEN
from runtime.engine.speculation.speculator import Speculator
from runtime.session.scoring import log_softmax, score
from runtime.session.session import Batch
from tests.support.engine_requests import (
    CHUNK,
    Collected,
    alike,
    check_slots,
    each_alone,
    requests,
    scores_of,
    submit,
    together,
)
from tests.support.tiny.architectures import write_random
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.hybrids import HYBRIDS

NUM_SLOTS, CAPACITY = 5, 128


class Exported(NamedTuple):
    """An artifact, and the graph of it that is tested."""

    artifact: Artifact
    dialect: str

    def open(self, **settings: int) -> OrtSession:
        session = open_cpu_session(
            self.artifact,
            self.dialect,
            num_slots=settings.get("num_slots", NUM_SLOTS),
            capacity=settings.get("capacity", CAPACITY),
        )
        assert isinstance(session, OrtSession)
        return session


MODELS = [("lfm2", "fp32"), ("lfm2", "w8a16"), ("qwen3_5", "fp32"), ("bamba", "fp32"), ("falcon_h1", "fp32")]
"""One for each kind of state, and one with states beside attention."""


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, native_library: ctypes.CDLL
) -> Artifact:
    name, precision = request.param
    path = tmp_path_factory.mktemp(name)
    source = write_random(path / "checkpoint", HYBRIDS[name])
    options = ExportOptions(
        model=str(source),
        out=path / "artifact",
        precision=precision,
        dialects=("ort", "native"),
        quantization=FEW_IDS,
        force=True,
    )
    export_model(options)
    return open_artifact(path / "artifact", allow_failed=True)


@pytest.fixture(scope="module", params=["ort", "native"])
def exported(request: pytest.FixtureRequest, artifact: Artifact) -> Exported:
    return Exported(artifact, request.param)


@pytest.fixture(scope="module")
def session(exported: Exported) -> Iterator[OrtSession]:
    session = exported.open()
    yield session
    session.close()


def states_of(session: OrtSession) -> list[np.ndarray]:
    assert isinstance(session._pool, HostPool) and session._pool._states
    return session._pool._states


@pytest.mark.parametrize("prefill_chunk", [CHUNK, 5, 33])
def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(session: OrtSession, prefill_chunk: int) -> None:
    assert together(Engine(session, prefill_chunk=prefill_chunk), requests()) == each_alone(session, requests())


def test_a_reused_slot_begins_with_zero_states(exported: Exported) -> None:
    """Whatever an earlier request has left: nothing here is a number."""
    session = exported.open()
    fresh = each_alone(session, requests()[:4])
    for state in states_of(session):
        assert state.any()
        state[:] = np.nan
    assert each_alone(session, requests()[:4]) == fresh
    session.close()


def test_padding_and_idle_rows_change_no_state(exported: Exported) -> None:
    """Three rows of 2, 0 and 20 tokens in one run, against each row by itself in another session."""
    rng = np.random.default_rng(3)
    heads, tails = rng.integers(3, 320, (3, 30)), rng.integers(3, 320, (3, 20))
    lens = np.array([2, 0, 20], np.int32)
    past = np.full(3, 30, np.int32)
    together, alone = exported.open(num_slots=3), exported.open(num_slots=3)
    for session in (together, alone):
        session.run(Batch(0, heads, np.zeros(3, np.int32), past, np.arange(3) * 30 + 29))
    before = [state.copy() for state in states_of(together)]
    together.run(Batch(0, tails, past, lens, np.array([0])))
    for row in (0, 2):
        own = tails[row : row + 1, : lens[row]]
        alone.run(Batch(row, own, past[:1], lens[row : row + 1], np.array([0])))
    for found, expected, old in zip(states_of(together), states_of(alone), before, strict=True):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found[1], old[1])
        assert (found[0] != old[0]).any() and (found[2] != old[2]).any()
    together.close()
    alone.close()


def test_preempted_requests_get_their_tokens(exported: Exported) -> None:
    rng = np.random.default_rng(5)
    asked = [
        (rng.integers(3, 320, rng.integers(1, 50)).tolist(), SamplingParams(max_tokens=150, temperature=0))
        for _ in range(8)
    ]
    session = exported.open(capacity=256)
    alone, layout = each_alone(session, asked), session.info.layout
    session.close()
    budget = layout.committed(256) + 3 * layout.step_bytes  # a page holds 64 tokens or 128
    session = exported.open(capacity=256)
    object.__setattr__(session._info, "kv_budget", budget)
    engine = Engine(session, prefill_chunk=CHUNK)
    for _ in range(MIN_SEEN):  # short answers are expected, so that memory runs out
        engine._lengths.observe(num_prompt=1, max_tokens=50, num_generated=1)
    assert together(engine, asked) == alone
    assert engine.stats().num_preempted > 0
    session.close()


def test_a_row_that_moves_takes_its_states_along(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sessions whose idle rows cost time move rows."""
    session = Exported(artifact, "ort").open()
    moved = []

    def copied(source: int, target: int, num_tokens: int) -> None:
        moved.append((source, target))
        HostPool.copy_slot(session._pool, source, target, num_tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "copy_slot", copied)
    asked = [([7 + idx] * 5, SamplingParams(max_tokens=[4, 60][idx % 2], temperature=0)) for idx in range(5)]
    tokens = together(Engine(session, prefill_chunk=CHUNK), asked)
    assert moved
    assert tokens == each_alone(session, asked)
    session.close()


def test_a_cancelled_request_leaves_nothing_behind(session: OrtSession) -> None:
    engine = Engine(session, prefill_chunk=CHUNK)
    sinks: list[Collected] = []
    for idx, (prompt, params) in enumerate(requests()):
        sinks.append(submit(engine, str(idx), prompt, params))
        engine.step()
        if idx % 4 == 1:
            engine.cancel(str(idx))  # some in the middle of their prompts
            check_slots(engine)
    while engine.has_work:
        engine.step()
    alone = each_alone(session, requests())
    kept = [idx for idx in range(len(sinks)) if idx % 4 != 1]
    assert [sinks[idx].tokens() for idx in kept] == [alone[idx] for idx in kept]


def test_nothing_is_drafted(session: OrtSession) -> None:
    engine = Engine(session, prefill_chunk=CHUNK, drafter=Speculator(min_gain=0.0))
    assert not engine.is_speculating
    assert together(engine, requests()) == each_alone(session, requests())


@pytest.mark.parametrize("prefill_chunk", [CHUNK, 5, 24])
def test_tokens_are_the_same_out_of_the_prefix_cache(session: OrtSession, prefill_chunk: int) -> None:
    cold = each_alone(session, alike())
    engine = Engine(session, prefill_chunk=prefill_chunk, prefix_cache=10**8)
    assert together(engine, alike()) == cold
    num_cached = 0
    for idx, (prompt, params) in enumerate(alike()):
        sink = submit(engine, str(idx), prompt, params)
        usage = engine.live[str(idx)].request.usage
        while engine.has_work:
            engine.step()
        assert sink.tokens() == cold[idx]
        # Each prompt is known: all whole blocks but for the last two tokens come with their states.
        assert usage.num_cached == (len(prompt) - 2) // BLOCK_LEN * BLOCK_LEN
        num_cached += usage.num_cached
    assert num_cached > 500
    cache = engine._scheduler.cache
    held = [*cache._blocks.values(), *cache._states.values()]
    assert cache._states and cache.num_bytes == sum(rows.nbytes for rows in held)


def test_states_are_evicted_with_their_blocks(session: OrtSession) -> None:
    """Memory for a few blocks alone: tokens stay the same, and the bound holds."""
    limit = 8 * BLOCK_LEN * session.info.kv_bytes_per_token + 2 * sum(state[0].nbytes for state in states_of(session))
    engine = Engine(session, prefill_chunk=CHUNK, prefix_cache=limit)
    rng = np.random.default_rng(4)
    asked = [
        (rng.integers(3, 320, length).tolist(), SamplingParams(max_tokens=3, temperature=0)) for length in (70, 40, 100)
    ]
    asked = [*asked, *asked, *asked[::-1]]
    assert together(engine, asked) == each_alone(session, asked)
    cache = engine._scheduler.cache
    assert cache._states.keys() <= cache._blocks.keys()
    held = [*cache._blocks.values(), *cache._states.values()]
    assert 0 < cache.num_bytes == sum(rows.nbytes for rows in held) <= limit


def test_a_prompt_is_scored_in_chunks(session: OrtSession) -> None:
    prompt = np.random.default_rng(9).integers(3, 320, 50).tolist()
    expected = [
        float(row[token])
        for chunk in score(session, [prompt])
        for row, token in zip(log_softmax(chunk.logits), chunk.next_ids, strict=True)
    ]
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=1)
    engine = Engine(session, prefill_chunk=CHUNK)
    sink = submit(engine, "scored", prompt, params)
    submit(engine, "beside", prompt[::-1], params)
    while engine.has_work:
        engine.step()
    # The sampler sums the exponentials in float64.
    np.testing.assert_allclose(scores_of(sink), expected, atol=1e-5)


def test_the_states_are_counted(exported: Exported, tmp_path: Path) -> None:
    states = exported.artifact.manifest.states
    assert states and exported.artifact.manifest.state_bytes == sum(4 * int(np.prod(state.shape)) for state in states)
    session = exported.open()
    assert session.info.has_states
    assert [array.shape for array in states_of(session)] == [(NUM_SLOTS, *state.shape) for state in states]
    session.close()
