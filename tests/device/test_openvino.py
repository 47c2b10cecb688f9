"""OpenVINO behind the scheduler: ONNX Runtime's tokens on the same artifact, in ragged batches and reused slots."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.model.families.architectures import parse_config
from export.pipeline.artifact_files import write_unverified
from export.pipeline.graph_files import ExportPlan
from export.schemes.registry import SCHEMES
from runtime.artifact.manifest import Artifact
from runtime.backends.openvino.backend import OpenVino
from runtime.backends.openvino.session import OpenVinoSession
from runtime.backends.ort.session import OrtSession
from runtime.backends.registry import open_session
from runtime.commands.replay import replay
from runtime.core import SamplingParams
from runtime.engine.engine import Engine
from runtime.errors import InvalidArtifact, InvalidSetting
from runtime.session.session import Batch, Session
from runtime.settings import EngineSettings
from tests.support.engine_requests import CHUNK, Asked, alike, each_alone, requests, submit, together
from tests.support.simulated.session import export_tiny
from tests.support.tiny.architectures import BEYOND_LLAMA, RandomCheckpoint

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'headrace[openvino]'")
NEAR = 1e-3
"""Of logits up to 40 in float32: both add the same numbers in another order. Measured: 1e-4."""


@pytest.fixture(scope="module", params=["llama-mqa-wide-heads", "qwen2-yarn", "qwen3", "mistral-sliding"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_tiny(tmp_path_factory.mktemp(request.param), request.param, dialects=("ort",))


@pytest.fixture(scope="module")
def session(tiny: Artifact) -> Iterator[OpenVinoSession]:
    session = OpenVinoSession.open(tiny, num_slots=5, capacity=128, threads=1)
    yield session
    session.close()
    session.close()


def rows(slot: int, ids: list[list[int]], past: list[int]) -> Batch:
    """Rows of the given new tokens; the last token's logits of each row that has any."""
    width = max(map(len, ids))
    padded = np.array([row + [0] * (width - len(row)) for row in ids])
    wanted = [idx * width + len(row) - 1 for idx, row in enumerate(ids) if row]
    lengths = np.array(list(map(len, ids)), np.int32)
    return Batch(slot, padded, np.array(past, np.int32), lengths, np.array(wanted))


def greedy() -> Asked:
    """Requests whose tokens do not hang on the last digits of a probability."""
    return [
        (prompt, SamplingParams(max_tokens=params.max_tokens, temperature=0)) for prompt, params in requests() + alike()
    ]


def token_ids(answers: list[list[tuple[int | None, float | None]]]) -> list[list[int | None]]:
    return [[token_id for token_id, _ in answer] for answer in answers]


def test_ragged_runs_give_onnx_runtimes_logits_and_cache(tiny: Artifact, session: OpenVinoSession) -> None:
    """A prefill of three rows, a decode step, and a run in which one row goes on, one has a single token, one idles."""
    reference = OrtSession.open(tiny, num_slots=5, capacity=128)
    ids = np.random.default_rng(3).integers(0, 320, (3, 70)).tolist()
    runs = [
        rows(1, [ids[0][:70], ids[1][:33], ids[2][:5]], [0, 0, 0]),
        rows(1, [[7], [8], [9]], [70, 33, 5]),
        rows(1, [ids[1][:6], [3], []], [71, 34, 6]),
    ]
    for run in runs:
        np.testing.assert_allclose(session.run(run), reference.run(run), atol=NEAR)
    # From inside one block of the cache to inside another.
    ours, theirs = session.read_slot(1, 3, 77), reference.read_slot(1, 3, 77)
    assert ours.nbytes == theirs.nbytes == 74 * session.info.kv_bytes_per_token
    for one, other in zip(ours.arrays, theirs.arrays, strict=True):
        np.testing.assert_allclose(one, other, atol=NEAR)
    reference.close()


def test_the_engine_gives_onnx_runtimes_tokens(tiny: Artifact, session: OpenVinoSession) -> None:
    reference = OrtSession.open(tiny, num_slots=5, capacity=128)
    expected = token_ids(each_alone(reference, greedy()))
    reference.close()
    assert token_ids(together(Engine(session, prefill_chunk=CHUNK), greedy())) == expected
    with_prefixes = Engine(session, prefill_chunk=CHUNK, prefix_cache=10**7)
    assert token_ids(together(with_prefixes, greedy())) == expected
    assert token_ids(together(with_prefixes, greedy())) == expected, "from rows of the prefix cache"


def test_a_slot_of_a_cancelled_request_serves_the_next(session: OpenVinoSession) -> None:
    expected = token_ids(each_alone(session, greedy()))
    engine = Engine(session, prefill_chunk=CHUNK)
    for idx in range(5):
        submit(engine, f"cancelled {idx}", list(range(3, 60)), SamplingParams(max_tokens=50, temperature=0))
    for _ in range(9):
        engine.step()
    for idx in range(5):
        engine.cancel(f"cancelled {idx}")
    assert token_ids(together(engine, greedy())) == expected


def test_rows_and_slots_that_were_copied_go_on_as_their_source(session: OpenVinoSession) -> None:
    ids = np.random.default_rng(4).integers(0, 320, 75).tolist()
    session.run(rows(0, [ids], [0]))
    expected = session.run(rows(0, [[5]], [75])).copy()
    session.copy_slot(0, 2, 75)
    np.testing.assert_array_equal(session.run(rows(2, [[5]], [75])), expected)
    kept = session.read_slot(0, 10, 75)
    session.run(rows(3, [ids[:10]], [0]))
    session.run(rows(0, [[9] * 80], [0]))
    session.write_slot(3, 10, kept)
    # The first ten were computed in a run of ten, not of 75, by a kernel that adds in another order.
    np.testing.assert_allclose(session.run(rows(3, [[5]], [75])), expected, atol=NEAR)
    again = session.read_slot(3, 10, 75)
    assert all(np.array_equal(one, other) for one, other in zip(kept.arrays, again.arrays, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "w8a16", "w4a16", "w8a8"])
def test_it_chooses_the_receipts_tokens(tmp_path: Path, precision: str) -> None:
    artifact = export_tiny(tmp_path, "llama", precision, dialects=("ort",), hidden_size=128, intermediate_size=256)
    settings = EngineSettings(device="openvino", max_batch=6, prefill_chunk=1, kv_memory=10**8, threads=1)
    session: Session = open_session(artifact, settings)
    found = replay(artifact, session)
    assert session.info.device.startswith("openvino 20")
    session.close()
    assert found.passed, found


def test_what_it_does_not_run_is_said(tmp_path: Path) -> None:
    artifact = export_tiny(tmp_path, "llama", "fp16", dialects=("ort",), num_hidden_layers=1)
    with pytest.raises(
        InvalidArtifact, match=r"is fp16, float16 KV cache: --device openvino runs fp32, w8a16, w4a16, w8a8"
    ):
        OpenVino().check(artifact)


def test_an_operator_it_does_not_read_is_named(tiny: Artifact, tmp_path: Path) -> None:
    graph = onnx.load(tiny.model_file("ort"), load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    shutil.copy(tiny.path / "weights.bin", tmp_path)
    onnx.save(graph, tmp_path / "model.onnx")
    changed = Artifact(tmp_path, tiny.manifest, tiny.receipt)
    with pytest.raises(InvalidArtifact, match=r"OpenVINO cannot read .*GroupQueryAttention with softcap"):
        OpenVinoSession.open(changed, num_slots=1, capacity=16)


def test_a_slot_longer_than_the_export(tiny: Artifact) -> None:
    with pytest.raises(InvalidSetting, match="a slot of 257 tokens does not fit"):
        OpenVinoSession.open(tiny, num_slots=1, capacity=257)


@pytest.mark.parametrize("family", BEYOND_LLAMA)
def test_a_graph_that_openvino_cannot_read_is_refused_by_what_it_has(family: str, tmp_path: Path) -> None:
    config = parse_config(BEYOND_LLAMA[family])
    plan = ExportPlan(
        checkpoint=RandomCheckpoint(config), config=config.for_length(128), scheme=SCHEMES["fp32"], max_len=128
    )
    artifact = write_unverified(tmp_path, plan)
    attention, rotary = config.attention, config.attention.rotary
    reasons = {
        "recurrent states": config.has_states,
        "learned positions": config.embedding.positions is not None,
        "attention_bias": attention.alibi,
        "softcap": attention.softcap is not None,
        "head_sink": attention.sinks is not None,
        "RotaryEmbedding": rotary is not None and (rotary.dim % 16 or attention.norms_rotated),
        "rotary_interleaved": rotary is not None and rotary.interleaved,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is None:
        OpenVinoSession.open(artifact, num_slots=2, capacity=64, threads=1).close()
        return
    with pytest.raises(InvalidArtifact, match=f"OpenVINO cannot read .*{reason}.*--device cpu"):
        OpenVinoSession.open(artifact, num_slots=2, capacity=64, threads=1)
