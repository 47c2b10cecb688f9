"""The engine on a real graph: every request gets, bit for bit, what it gets alone, whatever runs beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.calibration_set import CalibrationOptions
from export.int8_export import QuantizationOptions
from export.pipeline import ExportOptions, export_model
from runtime.artifact import open_artifact
from runtime.core import FinishReason, Request, SamplingParams, TokenEvent
from runtime.engine import Engine
from runtime.ort_session import OrtSession
from tests.tiny_checkpoint import config_of, write_checkpoint

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


class Collected(list[TokenEvent]):
    """A sink that keeps what it gets."""

    def tokens(self) -> list[tuple[int | None, float | None]]:
        assert self[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return [(event.token_id, event.logprob) for event in self]


def submit(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> Collected:
    sink = Collected()
    engine.add(
        engine.prepare(
            Request(request_id=name, prompt_ids=prompt, params=params, eos_ids=frozenset({2}), sink=sink.append)
        )
    )
    return sink


@pytest.mark.parametrize(("precision", "kv"), [("fp32", "compute"), ("w8a16", "compute"), ("fp32", "int8")])
def test_a_request_gets_the_same_tokens_alone_and_in_a_batch(tmp_path: Path, precision: str, kv: str) -> None:
    source = write_checkpoint(tmp_path / "checkpoint", config_of("qwen3"))
    text = QuantizationOptions(calib=CalibrationOptions(num_samples=8, length=64))
    settings: dict[str, Any] = {"precision": precision, "kv": kv, "quantization": text, "force": True}
    export_model(ExportOptions(model=str(source), out=tmp_path / "artifact", **settings))
    session = OrtSession.open(open_artifact(tmp_path / "artifact", allow_failed=True), num_slots=5, capacity=128)
    alone = []
    for idx, (prompt, params) in enumerate(requests()):
        engine = Engine(session, prefill_chunk=CHUNK)
        sink = submit(engine, str(idx), prompt, params)
        while engine.has_work:
            engine.step()
        alone.append(sink.tokens())
    together = Engine(session, prefill_chunk=CHUNK)
    sinks = []
    for idx, (prompt, params) in enumerate(requests()):
        sinks.append(submit(together, str(idx), prompt, params))
        if idx % 3 == 2:
            together.step()
    while together.has_work:
        together.step()
    for idx, sink in enumerate(sinks):
        assert sink.tokens() == alone[idx], f"request {idx}"
