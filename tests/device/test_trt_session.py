"""The TensorRT session on the simulated GPU: ONNX Runtime's numbers, kilobytes a step, and what it refuses."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.artifact.manifest import Artifact, open_artifact
from runtime.artifact.plan_files import PlanFile, plans_of
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.ort.session import OrtSession
from runtime.backends.tensorrt.session import TrtSession
from runtime.core import SamplingParams
from runtime.engine.engine import Engine
from runtime.errors import DeviceFailed, DeviceOutOfMemory, DeviceUnavailable, InvalidPlan, InvalidSetting
from runtime.session.session import Batch, TopSession
from tests.support.engine_requests import CHUNK, requests, submit
from tests.support.session_runs import LOGIT_TOLERANCE
from tests.support.simulated.cuda import CudaError, SimCuda
from tests.support.simulated.session import CAPACITY, export_tiny, open_simulated, plan_of, write_plan_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = export_tiny(tmp_path_factory.mktemp("tiny"))
    write_plan_files(artifact)
    return artifact


@contextmanager
def session_on(sim: SimCuda, artifact: Artifact, **options: object) -> Iterator[TrtSession]:
    """A session that is closed in the end, with nothing left on the device."""
    session = open_simulated(artifact, sim, **options)  # type: ignore[arg-type]  # passed on as they are
    try:
        yield session
    finally:
        session.close()
        session.close()
        sim.assert_all_freed()


def batch_of(first_slot: int, ids: list[list[int]], past: list[int], query: list[int] | None = None) -> Batch:
    """A batch that wants the logits of every row's last token."""
    query = query or [len(row) for row in ids]
    width = max(len(row) for row in ids)
    token_ids = np.array([row + [0] * (width - len(row)) for row in ids])
    wanted = [row * width + num - 1 for row, num in enumerate(query) if num]
    return Batch(first_slot, token_ids, np.array(past, np.int32), np.array(query, np.int32), np.array(wanted))


def test_prefill_decode_and_copies_give_onnx_runtimes_logits(tiny: Artifact) -> None:
    rng = np.random.default_rng(0)
    reference = OrtSession.open(tiny, num_slots=8, capacity=CAPACITY)
    with session_on(SimCuda(), tiny) as session:
        assert isinstance(session, TopSession)
        steps = [batch_of(2, [rng.integers(3, 320, 7).tolist(), rng.integers(3, 320, 5).tolist()], [0, 0])]
        for step in range(4):  # slot 1 stays idle: its row is not read
            past, query = [step, 0, 7 + step, 5 + step], [1, 0, 1, 1]
            steps.append(batch_of(0, rng.integers(3, 320, (4, 1)).tolist(), past, query))
        for batch in steps:
            assert np.abs(session.run(batch) - reference.run(batch)).max() < LOGIT_TOLERANCE
        for each in (session, reference):
            each.copy_slot(2, 7, 9)
        tail = batch_of(7, [[5, 6]], [9])
        assert np.abs(session.run(tail) - reference.run(tail)).max() < LOGIT_TOLERANCE


def test_a_decode_step_is_one_launch_and_copies_kilobytes(tiny: Artifact) -> None:
    sim = SimCuda()
    with session_on(sim, tiny) as session:
        for step in range(5):
            batch = batch_of(0, [[5 + step], [6], [7]], [step] * 3)
            top = session.run_top(batch)
            assert sim.num_launches == max(0, step), "the first run sets up, the second records, then launches alone"
        sent = sim.copied_out[-1]
        assert sent < 4 * 64 * 16, "4 rows, the bucket, of 64 candidates of 12 bytes and a sum"
        best = top.ids[:, 0].copy()
        rows = session.run(batch)
        assert sim.copied_out[-1] == 3 * 320 * 4
        np.testing.assert_array_equal(best, rows.argmax(-1))
        sums = np.log(np.exp(rows.astype(np.float64)).sum(-1))
        np.testing.assert_allclose(session.run_top(batch).log_sum, sums, rtol=1e-5)


def test_padding_a_batch_leaves_the_other_slots_alone(tiny: Artifact) -> None:
    """Three rows run in the bucket of four: the idle row writes after what slot 3 holds, or there is no padding."""
    rng = np.random.default_rng(1)
    reference = OrtSession.open(tiny, num_slots=8, capacity=CAPACITY)
    sim = SimCuda()
    with session_on(sim, tiny) as session:
        for length in (20, CAPACITY):
            prompt = rng.integers(3, 320, length - 1).tolist()
            for start in range(0, length - 1, 32):
                piece = batch_of(3, [prompt[start : start + 32]], [start])
                session.run_top(piece)
                reference.run(piece)
            launches = sim.num_launches
            for step in range(3):
                session.run_top(batch_of(0, [[9], [10], [11]], [step] * 3))
                reference.run(batch_of(0, [[9], [10], [11]], [step] * 3))
                last = batch_of(3, [[12]], [length - 1])
                assert np.abs(session.run(last) - reference.run(last)).max() < LOGIT_TOLERANCE
            # Of three steps the first of all only sets up. Once slot 3 is full, an idle row there has no place for
            # what it writes, and the batch runs as it is.
            assert sim.num_launches - launches == (2 if length < CAPACITY else 1)


@pytest.mark.parametrize("dialect", ["trt", "trt-plain"])
def test_the_engine_gets_onnx_runtimes_tokens(tmp_path: Path, dialect: str) -> None:
    """Prompts of one token to several chunks, greedy, filtered and penalised, joining and leaving: the same tokens.

    Against the same dialect on ONNX Runtime: the `ort` dialect adds its floats in another order.
    """
    artifact = export_tiny(tmp_path, "qwen3", dialects=(dialect,))
    write_plan_files(artifact, dialect=dialect, max_batch=5, chunk=CHUNK)
    plain = OrtSession.open(artifact, num_slots=5, capacity=CAPACITY, dialect=dialect)
    with session_on(SimCuda(), artifact, max_batch=5) as session:
        tokens = []
        for each in (plain, session):
            engine, sinks = Engine(each, prefill_chunk=CHUNK), []
            for idx, (prompt, params) in enumerate(requests()):
                narrowed = replace(params, top_k=40) if idx % 4 == 0 else params
                sinks.append(submit(engine, str(idx), prompt, narrowed))
                if idx % 3 == 2:
                    engine.step()
            while engine.has_work:
                engine.step()
            tokens.append([[event.token_id for event in sink] for sink in sinks])
        assert tokens[0] == tokens[1]


def test_a_step_copies_whole_rows_only_for_who_needs_them(tiny: Artifact) -> None:
    sim = SimCuda()
    with session_on(sim, tiny) as session:
        engine = Engine(session, prefill_chunk=32)
        submit(engine, "greedy", [5, 6], SamplingParams(max_tokens=3, temperature=0.0, logprobs=3))
        submit(engine, "top-k", [7], SamplingParams(max_tokens=3, top_k=20, top_p=0.9, seed=1))
        while engine.has_work:
            engine.step()
        assert max(sim.copied_out) < 4096
        submit(engine, "all", [7], SamplingParams(max_tokens=1, temperature=1.0, seed=1))
        engine.step()
        assert sim.copied_out[-1] == 320 * 4


def test_what_the_engine_or_the_memory_has_no_room_for(tiny: Artifact) -> None:
    sim = SimCuda()
    with session_on(sim, tiny, max_batch=64) as session:
        assert session.info.num_slots == 8, "the engine was built for so many"
    slot_bytes = CAPACITY * session.info.kv_bytes_per_token
    with session_on(SimCuda(), tiny, kv_memory=3 * slot_bytes) as session:
        assert session.info.num_slots == 3
    with pytest.raises(InvalidSetting, match=f"--max-len {CAPACITY + 1} is beyond the {CAPACITY}"):
        open_simulated(tiny, sim, capacity=CAPACITY + 1)
    small = SimCuda(total_bytes=20_000)
    with pytest.raises(DeviceOutOfMemory, match=r"the device has no .* for .*--max-batch"):
        open_simulated(tiny, small)
    small.assert_all_freed()
    starved = SimCuda(total_bytes=200_000)
    with pytest.raises(InvalidSetting, match="one KV slot of 128 tokens takes"):
        open_simulated(tiny, starved, kv_memory=1)
    starved.assert_all_freed()


def test_a_run_beyond_every_profile_is_named(tiny: Artifact) -> None:
    with (
        session_on(SimCuda(), tiny) as session,
        pytest.raises(InvalidPlan, match=r"holds a run of 1 rows, 33 tokens, .*32 a chunk"),
    ):
        session.run(batch_of(0, [[5] * 33], [0]))


def test_a_device_that_breaks_while_running(tiny: Artifact) -> None:
    sim = SimCuda()
    with session_on(sim, tiny) as session:
        sim.fail_at_synchronize = CudaError.cudaErrorIllegalAddress
        with pytest.raises(DeviceFailed, match="cudaErrorIllegalAddress"):
            session.run(batch_of(0, [[5]], [0]))
        sim.fail_at_synchronize = CudaError.cudaSuccess


def test_no_device() -> None:
    with pytest.raises(DeviceUnavailable, match="cudaErrorNoDevice"):
        Cuda(SimCuda(num_devices=0))


class TestPlansThatCannotBeUsed:
    """Truncated, of another GPU or version, from another export: said by name, and nothing is left on the device."""

    @pytest.fixture
    def artifact(self, tiny: Artifact, tmp_path: Path) -> Artifact:
        for file in tiny.path.iterdir():
            if file.is_file():
                (tmp_path / file.name).hardlink_to(file)
        return open_artifact(tmp_path)

    def test_none_at_all(self, artifact: Artifact) -> None:
        with pytest.raises(InvalidPlan, match=r"has no engine for .*sm89.*none at all.*headrace engine"):
            plan_of(artifact)

    @pytest.mark.parametrize(("option", "value"), [("version", "1.6.0"), ("gpus", ("sm86",))])
    def test_of_another_kind(self, artifact: Artifact, option: str, value: str) -> None:
        write_plan_files(artifact, **{option: value})  # type: ignore[arg-type]  # one of the two
        with pytest.raises(InvalidPlan, match="has no engine for"):
            plan_of(artifact)

    @pytest.mark.parametrize("change", ["truncated", "changed"])
    def test_damaged(self, artifact: Artifact, change: str) -> None:
        plan = write_plan_files(artifact)
        data = plan.read_bytes()
        plan.write_bytes(data[:-9] if change == "truncated" else data[:-3] + b"xyz")
        with pytest.raises(InvalidPlan, match="has no engine for" if change == "truncated" else "has changed"):
            plan_of(artifact)

    @pytest.mark.parametrize("has_validity", [True, False])
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"{", "truncated or not a plan|MALFORMED_ENGINE"),
            ({"version": "1.6.0"}, "another version of the library|VERSION_MISMATCH"),
            ({"gpus": ["sm86"]}, "built for other GPUs|UNSUPPORTED_CC"),
        ],
    )
    def test_refused_by_the_library(
        self, artifact: Artifact, content: bytes | dict[str, object], said: str, has_validity: bool
    ) -> None:
        """What the .json beside the plan does not tell, the library does, each in its way."""
        path = write_plan_files(artifact)
        if isinstance(content, dict):
            content = json.dumps({**json.loads(path.read_bytes()), **content}).encode()
        (plan,) = plans_of(artifact)
        path.write_bytes(content)
        sim = SimCuda()
        with pytest.raises(InvalidPlan, match=said):
            open_simulated(artifact, sim, plan=PlanFile(path, plan.info, None), has_validity=has_validity)
        sim.assert_all_freed()
