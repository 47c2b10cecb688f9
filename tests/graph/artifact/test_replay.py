"""`headrace verify`: a device that chooses the receipt's tokens passes, one with a broken cache does not."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact
from runtime.backends.ort.session import OrtSession
from runtime.commands.replay import replay
from runtime.commands.verify import main
from runtime.errors import InvalidArtifact
from runtime.session.session import Batch, Session, SessionInfo
from tests.support.host_device import on_host
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.session import export_tiny, open_simulated, write_plan_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = export_tiny(tmp_path_factory.mktemp("tiny"))
    write_plan_files(artifact)
    return artifact


class Forgetful:
    """A session whose first slot begins a token too early: what a wrong cache index does."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def info(self) -> SessionInfo:
        return self._session.info

    def run(self, batch: Batch) -> NDArray[np.float32]:
        past = np.maximum(batch.past_len - 1, 0).astype(np.int32)
        return self._session.run(Batch(batch.first_slot, batch.token_ids, past, batch.query_len, batch.logits_idx))

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)


def test_every_session_chooses_the_receipts_tokens(tiny: Artifact) -> None:
    sessions: list[Session] = [
        OrtSession.open(tiny, num_slots=8, capacity=128),
        on_host(tiny, num_slots=3),
        open_simulated(tiny, SimCuda()),
    ]
    for session in sessions:
        found = replay(tiny, session)
        assert found.passed and found.prefill == found.decode == 1, found
        assert found.num_tokens == 20 * 64
        session.close()
    assert found.dialect == "trt"


def test_a_broken_cache_fails(tiny: Artifact) -> None:
    session = Forgetful(OrtSession.open(tiny, num_slots=8, capacity=128))
    found = replay(tiny, session)  # type: ignore[arg-type]  # the rest of the protocol is passed on
    assert not found.passed and found.decode < 0.7


def test_the_verb(tiny: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny.path), "--device", "cpu"]) == 0
    assert "100.0% of first and 100.0% of further tokens, of 1280, are the receipt's" in capsys.readouterr().out
    assert main([str(tiny.path), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_another_model_under_the_same_receipt_fails(tmp_path: Path, tiny: Artifact) -> None:
    other = export_tiny(tmp_path, "qwen3", dialects=("ort",))
    session = OrtSession.open(Artifact(other.path, other.manifest, tiny.receipt), num_slots=4, capacity=128)
    found = replay(Artifact(other.path, other.manifest, tiny.receipt), session)
    assert not found.passed


def test_a_receipt_from_before_is_said_to_be_one(tiny: Artifact) -> None:
    receipt = {name: value for name, value in tiny.receipt.items() if name != "replay"}
    session = OrtSession.open(tiny, num_slots=2, capacity=128)
    with pytest.raises(InvalidArtifact, match="has no tokens of the ort graph; export it again"):
        replay(Artifact(tiny.path, tiny.manifest, receipt), session)
    with pytest.raises(InvalidArtifact, match="no prompt of the receipt fits slots of 8 tokens"):
        replay(tiny, OrtSession.open(tiny, num_slots=2, capacity=8))
