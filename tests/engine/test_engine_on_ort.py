"""The engine on a real graph: every request gets, bit for bit, what it gets alone, whatever runs beside it."""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from export.calibration.dataset import CalibrationOptions
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.graph import WHOLE_ROWS
from runtime.backends.ort.session import OrtSession
from runtime.core import FinishReason, Request, SamplingParams, TokenEvent, Usage
from runtime.engine.engine import Engine
from runtime.engine.speculation.speculator import Speculator
from runtime.session.session import Batch, Session
from tests.support.tiny_checkpoint import config_of, write_checkpoint

CHUNK = 16


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


class Counted:
    """An EngineObserver that counts the prompt tokens that were not computed, and the drafted ones that were."""

    num_cached = num_drafted = 0

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        pass

    def on_first_token(self, *, ttft_s: float) -> None:
        pass

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        self.num_cached += usage.num_cached
        self.num_drafted += usage.num_drafted


class Collected(list[TokenEvent]):
    """A sink that keeps what it gets."""

    def tokens(self) -> list[tuple[int | None, float | None]]:
        assert self[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return [(event.token_id, event.logprob) for event in self]


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


def submit(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> Collected:
    sink = Collected()
    engine.add(
        engine.prepare(
            Request(request_id=name, prompt_ids=prompt, params=params, eos_ids=frozenset({2}), sink=sink.append)
        )
    )
    return sink


@pytest.fixture(scope="module", params=[("fp32", "compute"), ("w8a16", "compute"), ("fp32", "int8")], ids="-".join)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    precision, kv = request.param
    path = tmp_path_factory.mktemp(precision)
    source = write_checkpoint(path / "checkpoint", config_of("qwen3"))
    text = QuantizationOptions(calib=CalibrationOptions(num_samples=8, length=64))
    settings: dict[str, Any] = {"precision": precision, "kv": kv, "quantization": text, "force": True}
    export_model(ExportOptions(model=str(source), out=path / "artifact", **settings))
    return open_artifact(path / "artifact", allow_failed=True)


@pytest.fixture(scope="module")
def session(artifact: Artifact) -> Iterator[OrtSession]:
    session = OrtSession.open(artifact, num_slots=5, capacity=128)
    yield session
    session.close()


Asked = list[tuple[list[int], SamplingParams]]
Tokens = list[list[tuple[int | None, float | None]]]


def alone(session: Session, asked: Asked, prefill_chunk: int = CHUNK) -> Tokens:
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


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(session: OrtSession) -> None:
    assert together(Engine(session, prefill_chunk=CHUNK), requests()) == alone(session, requests())


@pytest.mark.parametrize("prefill_chunk", [5, 16, 33, 64])
def test_tokens_and_their_probabilities_are_the_same_out_of_the_prefix_cache(
    session: OrtSession, prefill_chunk: int
) -> None:
    observer = Counted()
    engine = Engine(session, prefill_chunk=prefill_chunk, prefix_cache=10**8, observer=observer)
    is_exact = session.info.is_cut_exact
    cold = alone(session, alike(), CHUNK if is_exact else prefill_chunk)
    assert together(engine, alike()) == cold
    observer.num_cached = 0
    assert together(engine, alike()) == cold
    # Whole blocks of 32 (of chunks too, where cuts matter) of the first 100 tokens, never a prompt's last two tokens.
    block = 32 if is_exact else math.lcm(32, prefill_chunk)
    assert observer.num_cached == sum((min(len(prompt), 100 + 2) - 2) // block * block for prompt, _ in alike())


LOSSLESS = [("fp32", "compute"), ("w8a16", "compute"), ("w8a8", "compute")]


@pytest.fixture
def exact_session(artifact: Artifact) -> Iterator[OrtSession]:
    session = OrtSession.open(artifact, num_slots=5, capacity=128, is_run_exact=True)
    assert WHOLE_ROWS not in os.environ
    yield session
    session.close()


@pytest.mark.parametrize("artifact", LOSSLESS, ids="-".join, indirect=True)
def test_drafts_change_no_token_and_no_probability(exact_session: OrtSession) -> None:
    asked = [(2 * prompt, params) for prompt, params in [*requests(), *alike()] if 2 * len(prompt) < 100]
    observer = Counted()
    speculator = Speculator(min_gain=0.0)
    engine = Engine(exact_session, prefill_chunk=CHUNK, prefix_cache=10**7, speculator=speculator, observer=observer)
    assert together(engine, asked) == alone(exact_session, asked)
    assert observer.num_drafted > 100 and observer.num_cached > 0


@pytest.mark.parametrize("artifact", LOSSLESS, ids="-".join, indirect=True)
def test_a_token_has_the_same_logits_by_itself_and_among_others_of_its_row(exact_session: OrtSession) -> None:
    session = exact_session
    rng = np.random.default_rng(5)
    past = np.array([40, 17, 122, 9], np.int32)  # the third fills its slot
    for slot, length in enumerate(past.tolist()):
        ids = rng.integers(3, 320, (1, length))
        session.run(Batch(slot, ids, np.zeros(1, np.int32), np.array([length], np.int32), np.array([length - 1])))
    token_ids = rng.integers(3, 320, (4, 6))
    ones = np.ones(4, np.int32)
    single = np.stack(
        [session.run(Batch(0, token_ids[:, [i]], past + np.int32(i), ones, np.arange(4))).copy() for i in range(6)], 1
    )
    for lens in ([6, 6, 6, 6], [1, 6, 3, 1], [2, 1, 0, 5]):
        query_len = np.array(lens, np.int32)
        wanted = np.flatnonzero(np.arange(6) < query_len[:, None])
        np.testing.assert_array_equal(
            session.run(Batch(0, token_ids, past, query_len, wanted)), single.reshape(24, -1)[wanted]
        )
