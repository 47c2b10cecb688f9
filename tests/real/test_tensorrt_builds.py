"""SmolLM2-135M: an engine of the whole in fp16; of its first layers and tokens in int8 and int4, to save CI minutes."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.artifact.writer import write_manifest
from export.calibration.dataset import CalibrationOptions
from export.checkpoint.protocol import Checkpoint
from export.checkpoint.view import CheckpointView
from export.model.description import LM_HEAD
from export.model.families.architectures import parse_config
from export.pipeline.artifact_files import write_unverified
from export.pipeline.calibrated import CalibratedModel, CalibrationInput, QuantizationOptions, calibrated_model
from export.pipeline.graph_files import ExportPlan
from export.quantize.rounding.layers import Int8Layer
from export.schemes.registry import SCHEMES
from export.sources.open import open_checkpoint
from export.tensorrt.build import BuiltPlan, PlanOptions, build_plan
from export.tensorrt.profiles import PlanLimits

pytestmark = pytest.mark.real

if platform.machine() != "x86_64":
    pytest.skip("tensorrt-rtx is installed for tests on x86-64 only", allow_module_level=True)

NUM_LAYERS, NUM_TOKENS = 2, 2048
OPTIONS = PlanOptions(gpus=("sm86",), limits=PlanLimits(max_batch=8, prefill_chunk=64, max_len=512))


class Beginning(CheckpointView):
    """A checkpoint cut after its first layers and tokens; without its tokenizer, which knows more of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        changes = {"num_hidden_layers": NUM_LAYERS, "vocab_size": NUM_TOKENS}
        self._config: Mapping[str, Any] = {**checkpoint.config, **changes}

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def text_files(self) -> Mapping[str, str]:
        return {}

    def load(self, name: str) -> NDArray[np.float32]:
        array = super().load(name)
        return array[:NUM_TOKENS] if "embed" in name else array


def built(directory: Path, checkpoint: Checkpoint, precision: str, model: CalibratedModel | None = None) -> BuiltPlan:
    """Without the receipt's figures, which take longer than the build; other tests hold that they are asked for."""
    config = parse_config(checkpoint.config)
    plan = ExportPlan(checkpoint=checkpoint, config=config, scheme=SCHEMES[precision], max_len=512, dialects=("trt",))
    if model is not None:
        plan = replace(plan, checkpoint=model.checkpoint, config=model.config, layers=model.layers)
    artifact = write_unverified(directory, plan)
    write_manifest(directory, artifact.manifest)
    graph = artifact.manifest.files[artifact.manifest.dialects["trt"]].sha256
    return build_plan(replace(artifact, receipt={"graphs": {"trt": graph}}), OPTIONS)


def check(plan: BuiltPlan, num_layers: int, num_tokens: int) -> Mapping[str, int]:
    """There, of a plausible size, in the memory foreseen, with its attention; the layer counts."""
    info, embedding_bytes = plan.info, 2 * num_tokens * 576
    weight_bytes = info.build["weight_bytes"]
    # All weights in their own width: int4 that came out as half precision would be four times as much.
    # The embedding, gathered and multiplied as the tied head, may lie there twice; kernels come to 10 MB.
    assert weight_bytes < plan.path.stat().st_size < weight_bytes + embedding_bytes + 20e6
    assert info.build["peak_bytes"] < info.build["predicted_peak_bytes"]
    assert (info.layers["attention"], info.layers["kv_cache_update"]) == (num_layers, 2 * num_layers)
    return info.layers


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m-instruct")


def test_the_whole_model_in_half_precision(tmp_path: Path, checkpoint: Checkpoint) -> None:
    plan = built(tmp_path, checkpoint, "fp16")
    assert plan.info.build["weight_bytes"] > 2 * 134e6
    layers = check(plan, 30, 49152)
    assert layers["quantize"] == layers["dequantize"] == 0


def test_int4_weights(tmp_path: Path, checkpoint: Checkpoint) -> None:
    layers = check(built(tmp_path, Beginning(checkpoint), "w4a16"), NUM_LAYERS, NUM_TOKENS)
    assert (layers["quantize"], layers["dequantize"]) == (0, 4 * NUM_LAYERS)


def test_int8_weights_and_activations(tmp_path: Path, checkpoint: Checkpoint) -> None:
    beginning = Beginning(checkpoint)
    options = QuantizationOptions(text=CalibrationOptions(num_samples=4, length=32))

    def generate(*_: Any) -> list[list[int]]:
        raise AssertionError("random ids need no sampling")

    config = parse_config(beginning.config)
    precision = SCHEMES["w8a8"]
    given = CalibrationInput(
        checkpoint=beginning, config=config, max_len=512, generate=generate, workdir=tmp_path / "work"
    )
    model = calibrated_model(given, precision, options)
    (tmp_path / "artifact").mkdir()
    layers = check(built(tmp_path / "artifact", beginning, "w8a8", model), NUM_LAYERS, NUM_TOKENS)
    rounded = [
        site
        for site, layer in model.layers["trt"].items()
        if isinstance(layer, Int8Layer) and layer.fine_scale is None and site.kind != LM_HEAD
    ]
    assert layers["quantize"] == len(rounded) > 0
    assert layers["dequantize"] == len(rounded) + 4 * NUM_LAYERS + 1, "every rounded input, every weight, the LM head"
