"""The engine on a real graph: every request gets, bit for bit, what it gets alone, whatever runs beside it."""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.graph import WHOLE_ROWS
from runtime.backends.ort.session import OrtSession
from runtime.core import FinishReason, Usage
from runtime.engine.engine import Engine
from runtime.engine.speculation.speculator import Speculator
from runtime.session.session import Batch
from tests.support.engine_requests import CHUNK, alike, each_alone, requests, together
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.checkpoint import config_of, write_checkpoint


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


@pytest.fixture(scope="module", params=[("fp32", "compute"), ("w8a16", "compute"), ("fp32", "int8")], ids="-".join)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    precision, kv = request.param
    path = tmp_path_factory.mktemp(precision)
    source = write_checkpoint(path / "checkpoint", config_of("qwen3"))
    settings: dict[str, Any] = {"precision": precision, "kv": kv, "quantization": FEW_IDS, "force": True}
    export_model(ExportOptions(model=str(source), out=path / "artifact", **settings))
    return open_artifact(path / "artifact", allow_failed=True)


@pytest.fixture(scope="module")
def session(artifact: Artifact) -> Iterator[OrtSession]:
    session = OrtSession.open(artifact, num_slots=5, capacity=128)
    yield session
    session.close()


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(session: OrtSession) -> None:
    assert together(Engine(session, prefill_chunk=CHUNK), requests()) == each_alone(session, requests())


@pytest.mark.parametrize("prefill_chunk", [5, 16, 33, 64])
def test_tokens_and_their_probabilities_are_the_same_out_of_the_prefix_cache(
    session: OrtSession, prefill_chunk: int
) -> None:
    observer = Counted()
    engine = Engine(session, prefill_chunk=prefill_chunk, prefix_cache=10**8, observer=observer)
    is_exact = session.info.is_cut_exact
    cold = each_alone(session, alike(), CHUNK if is_exact else prefill_chunk)
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
    engine = Engine(exact_session, prefill_chunk=CHUNK, prefix_cache=10**7, drafter=speculator, observer=observer)
    assert together(engine, asked) == each_alone(exact_session, asked)
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
