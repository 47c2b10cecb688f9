"""The engine on a native session: a request gets, bit for bit, what it gets alone; drafts and cached prompts too."""

import ctypes
from collections.abc import Iterator

import pytest

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.native_session import NativeSession
from runtime.commands.replay import replay
from runtime.engine.engine import Engine
from runtime.engine.speculation.speculator import Speculator
from tests.support.engine_requests import CHUNK, alike, each_alone, requests, together
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.checkpoint import config_of, write_checkpoint


@pytest.fixture(scope="module", params=[("fp32", "compute"), ("w8a16", "compute"), ("w8a8", "int8")], ids="-".join)
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, native_library: ctypes.CDLL
) -> Artifact:
    precision, kv = request.param
    path = tmp_path_factory.mktemp(precision)
    source = write_checkpoint(path / "checkpoint", config_of("qwen3"))
    options = ExportOptions(
        model=str(source),
        out=path / "artifact",
        precision=precision,
        kv=kv,
        dialects=("ort", "native"),
        quantization=FEW_IDS,
        force=True,
    )
    export_model(options)
    return open_artifact(path / "artifact", allow_failed=True)


@pytest.fixture(scope="module")
def session(artifact: Artifact) -> Iterator[NativeSession]:
    session = NativeSession.open_native(artifact, num_slots=5, capacity=128)
    yield session
    session.close()


@pytest.mark.parametrize("prefill_chunk", [CHUNK, 5, 33])
def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(session: NativeSession, prefill_chunk: int) -> None:
    assert together(Engine(session, prefill_chunk=prefill_chunk), requests()) == each_alone(session, requests())


def test_tokens_are_the_same_out_of_the_prefix_cache(session: NativeSession) -> None:
    engine = Engine(session, prefill_chunk=CHUNK, prefix_cache=10**8)
    cold = each_alone(session, alike(), CHUNK)
    assert together(engine, alike()) == cold
    assert together(engine, alike()) == cold


def test_drafts_change_no_token_and_no_probability(session: NativeSession) -> None:
    asked = [(2 * prompt, params) for prompt, params in [*requests(), *alike()] if 2 * len(prompt) < 100]
    engine = Engine(session, prefill_chunk=CHUNK, prefix_cache=10**7, drafter=Speculator(min_gain=0.0))
    assert together(engine, asked) == each_alone(session, asked)


def test_the_receipts_tokens_come_again(artifact: Artifact, session: NativeSession) -> None:
    found = replay(artifact, session)
    assert found.dialect == "native" and (found.prefill, found.decode) == (1.0, 1.0)
