"""SmolLM2-135M's own engines: fp16 whole, int8 and int4 with its first layers (each whole one takes half a minute)."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.architectures import parse_config
from export.calibration_set import CalibrationOptions
from export.checkpoint import Checkpoint, open_checkpoint
from export.engine_build import BuiltEngine, EngineOptions, build_engine
from export.engine_profiles import EngineLimits
from export.int8_export import QuantizationOptions, prepare_int8
from export.int8_model import Int8Model
from export.pipeline import write_unverified
from export.smoothing import LM_HEAD

pytestmark = pytest.mark.real

if platform.machine() != "x86_64":
    pytest.skip("tensorrt-rtx is installed for tests on x86-64 only", allow_module_level=True)

NUM_LAYERS = 3
EMBEDDING_BYTES = 49152 * 576 * 2
"""The embedding in half precision, which an engine holds twice: gathered, and as the tied LM head."""
OPTIONS = EngineOptions(gpus=("sm86",), limits=EngineLimits(max_batch=8, prefill_chunk=64, max_len=512))


class FirstLayers:
    """A checkpoint that ends after its first layers."""

    def __init__(self, checkpoint: Checkpoint, num_layers: int) -> None:
        self._checkpoint = checkpoint
        self.config: Mapping[str, Any] = {**checkpoint.config, "num_hidden_layers": num_layers}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


def built(directory: Path, checkpoint: Any, precision: str, model: Int8Model | None = None) -> BuiltEngine:
    """Without the receipt's figures, which take longer than the build; other tests hold that they are asked for."""
    config = parse_config(checkpoint.config)
    artifact = write_unverified(directory, checkpoint, config, None, 512, model, dialects=("trt",), name=precision)
    graph = artifact.manifest.files[artifact.manifest.dialects["trt"]].sha256
    return build_engine(replace(artifact, receipt={"graphs": {"trt": graph}}), OPTIONS)


def check(engine: BuiltEngine, num_layers: int) -> Mapping[str, int]:
    """There, of a plausible size, in the memory foreseen, with its attention; the layer counts."""
    info = engine.info
    weight_bytes = info.build["weight_bytes"]
    # All weights in their own width: int4 that came out as half precision would be four times as much.
    assert weight_bytes < engine.plan.stat().st_size < weight_bytes + EMBEDDING_BYTES + 20e6
    assert info.build["peak_bytes"] < info.build["predicted_peak_bytes"]
    assert (info.layers["attention"], info.layers["kv_cache_update"]) == (num_layers, 2 * num_layers)
    return info.layers


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m-instruct")


def test_the_whole_model_in_half_precision(tmp_path: Path, checkpoint: Checkpoint) -> None:
    engine = built(tmp_path, checkpoint, "fp16")
    assert engine.info.build["weight_bytes"] > 2 * 134e6
    layers = check(engine, 30)
    assert layers["quantize"] == layers["dequantize"] == 0


def test_int4_weights(tmp_path: Path, checkpoint: Checkpoint) -> None:
    layers = check(built(tmp_path, FirstLayers(checkpoint, NUM_LAYERS), "w4a16"), NUM_LAYERS)
    assert (layers["quantize"], layers["dequantize"]) == (0, 4 * NUM_LAYERS)


def test_int8_weights_and_activations(tmp_path: Path, checkpoint: Checkpoint) -> None:
    first = FirstLayers(checkpoint, NUM_LAYERS)
    options = QuantizationOptions(calib=CalibrationOptions(num_samples=4, length=32))

    def generate(*_: Any) -> list[list[int]]:
        raise AssertionError("the built-in texts need no sampling")

    config = parse_config(first.config)
    model = prepare_int8(first, config, options, tmp_path / "work", max_len=512, generate=generate)
    (tmp_path / "artifact").mkdir()
    layers = check(built(tmp_path / "artifact", first, "w8a8", model), NUM_LAYERS)
    rounded = [name for name, layer in model.layers.items() if layer.fine_scale is None and name != LM_HEAD]
    assert layers["quantize"] == len(rounded) > 0
    assert layers["dequantize"] == len(rounded) + 4 * NUM_LAYERS + 1, "every rounded input, every weight, the LM head"
