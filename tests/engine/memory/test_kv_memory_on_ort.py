"""The KV memory of real sessions: what the system has committed is what the engine counts, and preempted requests get
their tokens bit for bit."""

from typing import Any

import numpy as np
import pytest

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.openvino.session import OpenVinoSession
from runtime.backends.ort.pools import HostPool
from runtime.backends.ort.session import OrtSession
from runtime.core import SamplingParams
from runtime.engine.answer_lengths import MIN_SEEN
from runtime.engine.engine import Engine
from runtime.engine.speculation.speculator import Speculator
from runtime.errors import InvalidSetting
from runtime.machine.kv_pages import PAGE_BYTES, resident_bytes
from runtime.settings import EngineSettings
from tests.support.engine_requests import Collected, check_slots, each_alone, submit
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.checkpoint import config_of, write_checkpoint

CHUNK = 16
CAPACITY = 128


@pytest.fixture(scope="module", params=[("fp32", "compute"), ("w8a8", "compute"), ("fp32", "int8")], ids="-".join)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    precision, kv = request.param
    path = tmp_path_factory.mktemp(precision)
    # Heads of 64: a page holds 16 tokens in float32, so that requests of some dozens differ in pages.
    source = write_checkpoint(path / "checkpoint", config_of("qwen3", head_dim=64))
    settings: dict[str, Any] = {"precision": precision, "kv": kv, "quantization": FEW_IDS, "force": True}
    export_model(ExportOptions(model=str(source), out=path / "artifact", **settings))
    return open_artifact(path / "artifact", allow_failed=True)


def asked(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = np.random.default_rng(count)
    out = []
    for idx in range(count):
        settings: dict[str, Any] = {"temperature": 0.0} if idx % 2 else {"temperature": 1.0, "top_p": 0.9, "seed": idx}
        prompt = rng.integers(3, 320, rng.integers(1, 50)).tolist()
        out.append((prompt, SamplingParams(max_tokens=int(rng.integers(20, 60)), logprobs=1, **settings)))
    return out


def held(session: OrtSession) -> int:
    assert isinstance(session._pool, HostPool)
    return sum(map(resident_bytes, session._pool.arrays))


@pytest.mark.parametrize("way", ["plain", "cached", "run-exact", "drafts"])
def test_preempted_requests_get_their_tokens_bit_for_bit(artifact: Artifact, way: str) -> None:
    if way in ("run-exact", "drafts") and artifact.manifest.kv.dtype == "int8":
        pytest.skip("runs on an int8 cache are never exact")
    is_run_exact = way in ("run-exact", "drafts")
    session = OrtSession.open(artifact, num_slots=6, capacity=CAPACITY, is_run_exact=is_run_exact)
    alone = each_alone(session, asked(40), CHUNK)
    session.close()
    layout = session.info.layout
    session = OrtSession.open(
        artifact,
        num_slots=6,
        capacity=CAPACITY,
        is_run_exact=is_run_exact,
        kv_budget=layout.committed(CAPACITY) + 5 * layout.step_bytes,
    )
    engine = Engine(
        session,
        prefill_chunk=CHUNK,
        prefix_cache=10**6 if way == "cached" else 0,
        drafter=Speculator(min_gain=0.0) if way == "drafts" else None,
    )
    for _ in range(MIN_SEEN):  # short answers are expected, so that memory runs out
        engine._lengths.observe(num_prompt=1, max_tokens=50, num_generated=1)
    sinks: list[Collected] = []
    pending = list(enumerate(asked(40)))
    while pending or engine.has_work:
        for idx, (prompt, params) in pending[:3]:
            sinks.append(submit(engine, str(idx), prompt, params))
        del pending[:3]
        engine.step()
        check_slots(engine)
        slots, memory = engine._scheduler.slots, engine._scheduler.memory
        assert memory.budget is not None and memory.used <= memory.budget
        # Pages are never fewer than counted, but for the spare position, which only runs of one token write.
        slack = layout.step_bytes * int((slots.filled > 0).sum()) if is_run_exact else 0
        assert slots.committed - slack <= held(session) <= slots.committed
    assert held(session) == 0, "an idle engine has given everything back"
    assert engine.stats().num_preempted > 0
    assert [sink.tokens() for sink in sinks] == alone
    session.close()


def test_openvino_commits_what_is_counted(tmp_path: Any) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("qwen3", head_dim=64))
    export_model(ExportOptions(model=str(source), out=tmp_path / "artifact", quantization=FEW_IDS, force=True))
    artifact = open_artifact(tmp_path / "artifact", allow_failed=True)
    session = OpenVinoSession.open(artifact, num_slots=4, capacity=CAPACITY, threads=1)
    alone = each_alone(session, asked(10), CHUNK)
    session.close()
    layout = session.info.layout
    budget = layout.committed(CAPACITY) + 5 * layout.step_bytes
    session = OpenVinoSession.open(artifact, num_slots=4, capacity=CAPACITY, kv_budget=budget, threads=1)
    engine = Engine(session, prefill_chunk=CHUNK)
    for _ in range(MIN_SEEN):
        engine._lengths.observe(num_prompt=1, max_tokens=50, num_generated=1)
    sinks = [submit(engine, str(idx), prompt, params) for idx, (prompt, params) in enumerate(asked(10))]
    while engine.has_work:
        engine.step()
        committed = engine._scheduler.slots.committed
        real = sum(map(resident_bytes, session._pool))
        assert committed <= budget and abs(real - committed) <= layout.step_bytes * 4
    assert engine.stats().num_preempted > 0
    assert [sink.tokens() for sink in sinks] == alone
    session.close()


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_slots_are_addresses(tmp_path: Any, device: str) -> None:
    """As many as --max-batch says, whatever the memory; what it must hold is one request."""
    from runtime.backends.registry import open_session

    source = write_checkpoint(tmp_path / "checkpoint", config_of("qwen3", head_dim=64))
    export_model(ExportOptions(model=str(source), out=tmp_path / "artifact", quantization=FEW_IDS, force=True))
    artifact = open_artifact(tmp_path / "artifact", allow_failed=True)
    longest = artifact.manifest.dims.max_len
    request_bytes = longest * artifact.kv_bytes_per_token()
    session = open_session(artifact, EngineSettings(device=device, max_batch=50, kv_memory=request_bytes))
    assert session.info.num_slots == 50 and session.info.capacity == longest and session.info.kv_bytes == request_bytes
    assert session.info.threads is not None and session.info.layout.page_bytes == PAGE_BYTES
    assert Engine(session).max_len == longest
    session.close()
    with pytest.raises(
        InvalidSetting, match=r"a request of 200 tokens takes .* set --max-len \d+ or less, or a larger"
    ):
        open_session(artifact, EngineSettings(device=device, max_len=200, kv_memory=request_bytes // 3))
