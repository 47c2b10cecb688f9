"""The session of ONNX Runtime with its cache on a device, run here with the CPU as the device: bit for bit the same."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.artifact.manifest import Artifact
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.ort.cuda import OrtCuda
from runtime.backends.ort.drop_inputs import without_inputs
from runtime.backends.ort.graph import CPU_PROVIDER, load_device_graph
from runtime.backends.ort.session import OrtSession
from runtime.engine.engine import Engine
from runtime.errors import DeviceUnavailable, InvalidArtifact
from runtime.session.session import Batch
from runtime.settings import EngineSettings
from tests.support.engine_requests import CHUNK, requests, submit
from tests.support.host_device import on_host
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.session import export_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", dialects=("ort",))


def test_an_engine_that_is_not_ragged_gives_the_same_tokens(tiny: Artifact) -> None:
    tokens = []
    for session in (OrtSession.open(tiny, num_slots=5, capacity=128), on_host(tiny)):
        engine, sinks = Engine(session, prefill_chunk=CHUNK), []
        for idx, (prompt, params) in enumerate(requests()):
            sinks.append(submit(engine, str(idx), prompt, params))
            if idx % 3 == 2:
                engine.step()
        while engine.has_work:
            engine.step()
        tokens.append([sink.tokens() for sink in sinks])
        session.close()
    assert tokens[0] == tokens[1]
    assert not session.info.is_ragged


def test_a_copied_slot_goes_on_as_its_source(tiny: Artifact) -> None:
    session = on_host(tiny)
    one = np.ones(1, np.int32)
    session.run(Batch(1, np.array([[5, 6, 7, 8]]), 0 * one, 4 * one, np.array([3])))
    session.copy_slot(1, 3, 4)
    first, second = [session.run(Batch(slot, np.array([[9]]), 4 * one, one, np.array([0]))) for slot in (1, 3)]
    np.testing.assert_array_equal(first, second)
    session.close()
    session.close()


def test_rows_that_were_read_go_on_in_another_slot(tiny: Artifact) -> None:
    """Positions 2 to 7 of slot 1, out to plain memory and back into slot 3, whose first two are its own."""
    session = on_host(tiny)
    one = np.ones(1, np.int32)
    ids = np.array([[5, 6, 7, 8, 9, 10, 11]])
    session.run(Batch(1, ids, 0 * one, 7 * one, np.array([6])))
    rows = session.read_slot(1, 2, 7)
    assert rows.nbytes == 5 * session.info.kv_bytes_per_token
    session.run(Batch(3, ids[:, :2], 0 * one, 2 * one, np.array([1])))
    expected = session.run(Batch(1, np.array([[12]]), 7 * one, one, np.array([0])))
    session.run(Batch(1, np.full((1, 7), 99), 0 * one, 7 * one, np.array([6])))
    session.write_slot(3, 2, rows)
    np.testing.assert_array_equal(session.run(Batch(3, np.array([[12]]), 7 * one, one, np.array([0]))), expected)
    again = session.read_slot(3, 2, 7)
    assert all(np.array_equal(a, b) for a, b in zip(rows.arrays, again.arrays, strict=True))
    session.close()


@pytest.mark.parametrize(("width", "query"), [(2, [2, 1]), (1, [1, 0])])
def test_ragged_batches_are_our_bug(tiny: Artifact, width: int, query: list[int]) -> None:
    session = on_host(tiny)
    with pytest.raises(AssertionError, match=r"ragged|idle"):
        session.run(
            Batch(0, np.ones((2, width), np.int64), np.zeros(2, np.int32), np.array(query, np.int32), np.array([0]))
        )


def test_the_input_is_left_out_and_nothing_else(tiny: Artifact) -> None:
    file = tiny.model_file("ort")
    before = onnx.load(file, load_external_data=False)
    after = onnx.load_from_string(without_inputs(file.read_bytes(), "GroupQueryAttention", 9))
    attention = [node for node in after.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 3
    assert {len(node.input) for node in attention} == {9}
    for node in before.graph.node:
        if node.op_type == "GroupQueryAttention":
            assert node.input[-1] == "query_len"
            del node.input[9:]
    assert after == before


@pytest.mark.parametrize("data", [b"\x3a\x05ab", b"\x0f", b"\x80", b"\x0d\x01"])
def test_what_is_not_a_whole_model(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a (whole )?protobuf message"):
        without_inputs(data, "X", 1)


def test_cuda_without_its_provider_is_named(tiny: Artifact) -> None:
    sim = SimCuda()
    with pytest.raises(DeviceUnavailable, match="has no CUDAExecutionProvider: install 'headrace\\[cuda\\]'"):
        OrtCuda(lambda: Cuda(sim)).open(tiny, EngineSettings())
    sim.assert_all_freed()


def test_a_graph_that_is_no_model(tiny: Artifact, tmp_path: Path) -> None:
    broken = Artifact(tmp_path, tiny.manifest, tiny.receipt)
    (tmp_path / "model.onnx").write_bytes(tiny.model_file("ort").read_bytes()[:-100])
    with pytest.raises(InvalidArtifact, match="cannot load"):
        load_device_graph(broken, CPU_PROVIDER)
