"""`headrace bench`: every figure is there and makes sense; the roofline's counts against sums done by hand."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from headrace import main
from runtime.artifact.manifest import WEIGHTS
from runtime.commands.bench_runs import StepTimes
from runtime.commands.roofline import Peaks, decode_cost, int8_peak, prefill_cost
from runtime.core import FinishReason, Usage
from runtime.native.library import is_built
from tests.support.tiny.artifact import TinyExports

# The tiny model's sizes (tests/support/tiny/checkpoint.py).
LAYERS, HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 3, 64, 96, 320, 4, 2, 16
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * INNER
HEAD = VOCAB * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN


def numbers(value: Any) -> list[float]:
    """Every number of a JSON value; a figure that is missing is not a number."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [math.nan if value is None else value] if isinstance(value, int | float | None) else []


def test_the_json_line_has_every_figure(tiny: TinyExports, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tiny.artifact("llama-tied", has_tokenizer=True)
    flags = ["--batch", "3,1,3", "--prompt", "8,20", "--new-tokens", "4", "--repeat", "2", "--threads", "1"]
    assert main(["bench", str(artifact.path), *flags]) == 0
    table, line, end = capsys.readouterr().out.rpartition('{"benchmark"')
    result = json.loads(line + end)
    for words in ("decode x3", "greedy  x1", "sampled x3", "peak memory", "onnxruntime 1."):
        assert words in table
    assert [row["tokens"] for row in result["prefill"]] == [8, 20]
    assert [row["batch"] for row in result["decode"]] == [1, 3]
    assert [(row["batch"], row["sampling"]["temperature"]) for row in result["engine"]] == [(1, 0), (3, 0), (3, 0.8)]
    assert result["threads"] == 1
    assert result["peak_rss_bytes"] > 20e6, "an interpreter with ONNX Runtime loaded"
    for row in result["engine"]:
        assert {"tokens_per_s", "ttft_ms", "tpot_ms", "overhead_share"} <= set(row)
        assert 0 < row["overhead_share"] < 1
    greedy = {row.pop("sampling")["temperature"] for row in result["engine"]}
    assert greedy == {0, 0.8}
    for row in [*result["prefill"], *result["decode"]]:
        shares = [row["bandwidth_share"], row["compute_share"], row["int8_share"], row["roofline_share"]]
        assert (row["int8_share"] is None) == (result["int8_gop_s"] is None)
        assert row["roofline_share"] == pytest.approx(max(shares[:2])), "float32 weights: float32 is the peak"
    if not is_built():
        result.pop("int8_gop_s")
        for row in [*result["prefill"], *result["decode"]]:
            row.pop("int8_share")
    found = numbers(result)
    assert len(found) > 40 and all(math.isfinite(number) and number > 0 for number in found)


def test_only_the_json_line(tiny: TinyExports, capsys: pytest.CaptureFixture[str]) -> None:
    """One token a request: there is no time between two, and no figure is made up for it."""
    artifact = tiny.artifact("llama-tied", has_tokenizer=True)
    flags = ["--batch", "1", "--prompt", "8", "--new-tokens", "1", "--repeat", "1", "--json"]
    assert main(["bench", str(artifact.path), *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for row in json.loads(out)["engine"]:
        assert row["tpot_ms"] is None and row["overhead_share"] is None and row["ttft_ms"] > 0


@pytest.mark.parametrize("variant", ["llama-tied", "llama"])
def test_decode_cost_in_float32(tiny: TinyExports, variant: str) -> None:
    """Layers, norms and LM head once, of four bytes each; neither an untied embedding nor the rotary tables."""
    cost = decode_cost(tiny.artifact(variant, has_tokenizer=True), batch=5, context=10)
    assert cost.weight_bytes == 4 * (LAYERS * LAYER + HEAD + NORMS)
    assert cost.kv_bytes == 5 * 10 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    assert cost.flop == 5 * (2 * (LAYERS * LAYER + HEAD) + 4 * LAYERS * HEADS * HEAD_DIM * 10)


@pytest.mark.parametrize("variant", ["llama-tied", "llama"])
def test_prefill_cost(tiny: TinyExports, variant: str) -> None:
    """Bytes of a step, and K and V of every token; the LM head for one token, and half a square of attention."""
    artifact = tiny.artifact(variant, has_tokenizer=True)
    cost = prefill_cost(artifact, 10)
    assert cost.weight_bytes == decode_cost(artifact, batch=1, context=1).weight_bytes
    assert cost.kv_bytes == 10 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    assert cost.num_bytes == cost.weight_bytes + cost.kv_bytes
    assert cost.flop == 2 * (10 * LAYERS * LAYER + HEAD) + 4 * LAYERS * HEADS * HEAD_DIM * 55
    assert prefill_cost(artifact, 1).flop == decode_cost(artifact, batch=1, context=1).flop


def test_the_machine_is_the_best_of_its_measurements() -> None:
    assert Peaks.best([Peaks(2, 3, 40, None), Peaks(2, 5, 30, None)]) == Peaks(2, 5, 40, None)
    assert Peaks.best([Peaks(1, 1, 1, 7), Peaks(1, 1, 1, 9)]).int8 == 9


def test_int8_peak_needs_the_native_library() -> None:
    found = int8_peak(1)
    assert (found is not None and found > 1e8) if is_built() else found is None


@pytest.mark.parametrize("variant", ["llama-tied", "llama"])
def test_decode_cost_in_int8(tiny: TinyExports, variant: str) -> None:
    """A byte a weight and a float32 scale for 32 of them; the norms stay float32."""
    cost = decode_cost(tiny.artifact(variant, "w8a16", has_tokenizer=True), batch=1, context=1)
    matrices = LAYERS * LAYER + HEAD
    assert cost.weight_bytes == matrices + matrices // 32 * 4 + NORMS * 4


def test_an_artifact_that_does_not_say_what_a_step_reads(tiny: TinyExports) -> None:
    artifact = tiny.artifact("llama", has_tokenizer=True)
    old = replace(artifact, manifest=replace(artifact.manifest, step_weight_bytes=None))
    assert decode_cost(old, batch=1, context=1).weight_bytes == artifact.manifest.files[WEIGHTS].size


def test_overhead_is_that_of_full_decode_steps() -> None:
    times = StepTimes()
    times.on_step(num_decode=4, num_prefill_tokens=9, step_s=9.0, model_s=1.0)
    times.on_step(num_decode=3, num_prefill_tokens=0, step_s=9.0, model_s=1.0)
    assert times.overhead_share(4) is None
    times.on_step(num_decode=4, num_prefill_tokens=0, step_s=3.0, model_s=2.0)
    times.on_step(num_decode=4, num_prefill_tokens=0, step_s=1.0, model_s=1.0)
    assert times.overhead_share(4) == 0.25
    times.on_finish(reason=FinishReason.LENGTH, num_prompt=1, num_generated=3, tpot_s=2.0, usage=Usage())
    assert times.tpot_s == [2.0]
    times.clear()
    assert times.overhead_share(4) is None and not times.tpot_s


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens", "0"], "--new-tokens must be at least 1, got 0"),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--batch", "1,0"], "--batch '1,0'"),
        (["--batch", "many"], "--batch 'many'"),
        (["--prompt", ""], "--prompt ''"),
        (["--prompt", "8,-8"], "--prompt '8,-8'"),
        (["--prompt", "257"], "exported for 256"),
        (["--new-tokens", "250"], "exported for 256"),
        (["--batch", "9000000"], "ask for fewer rows"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tiny: TinyExports, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    artifact = tiny.artifact("llama", has_tokenizer=True)
    capsys.readouterr()  # a slow export draws progress bars
    assert main(["bench", str(artifact.path), "--prompt", "8", *flags]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_an_artifact_without_tokenizer_is_refused(tiny: TinyExports, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tiny.artifact("llama")
    capsys.readouterr()
    assert main(["bench", str(artifact.path), "--prompt", "8"]) == 2
    error = capsys.readouterr().err
    assert "tokenizer.json" in error and error.count("\n") == 1
