"""Experts: how files stack them, and calibration, whose receipt counts the experts that no text reached."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.calibration.dataset import CalibrationOptions
from export.model.checks.tensors import check_tensors, expected_tensors
from export.model.families.architectures import as_described, parse_config
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from export.quantize.int8.saved import load_calibration
from export.sources.open import open_checkpoint
from runtime.artifact.manifest import Artifact
from tests.support.tiny.checkpoint import write_checkpoint
from tests.support.tiny.experts import EXPERTS, MIXTRAL

# The first of the second layer's experts is never chosen: its logit is 0, and of 63 others more than two are above.
MANY = {**MIXTRAL, "num_hidden_layers": 2, "num_local_experts": 64, "intermediate_size": 64}
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("many"), MANY, shapes=expected_tensors(parse_config(MANY)))
    tensors = load_file(path / "model.safetensors")
    tensors[ROUTER][0] = 0
    save_file(tensors, path / "model.safetensors")
    return path


def exported(model: Path, out: Path, precision: str, num_samples: int, length: int = 48) -> Artifact:
    text = QuantizationOptions(text=CalibrationOptions(num_samples=num_samples, length=length), ignore_memory=True)
    return export_model(ExportOptions(model=str(model), out=out, precision=precision, quantization=text, force=True))


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_an_expert_that_text_never_reaches_is_counted_and_computes_all_the_same(
    model: Path, tmp_path: Path, precision: str
) -> None:
    artifact = exported(model, tmp_path / "out", precision, num_samples=32, length=64)
    account = artifact.receipt["quantization"]
    assert account["experts_not_reached"] == 1
    if precision == "w8a8":
        assert account["weight_only"] == ["layers.1.gate_up.0", "layers.1.down.0"]
    assert json.loads((artifact.path / "manifest.json").read_text()) and np.isfinite(artifact.receipt["figures"]["kl"])


def test_every_expert_that_text_reaches_has_a_range(model: Path, tmp_path: Path) -> None:
    """28 tokens of each sequence are sampled for ranges, too few for 64 experts; the others reach more."""
    artifact = exported(model, tmp_path / "out", "w8a8", num_samples=2, length=200)
    found = load_calibration(artifact.path, MANY["vocab_size"])
    reached, ranged = (
        {site for site in sites if site.expert is not None} for sites in (found.statistics, found.ranges)
    )
    assert 200 < len(reached) < 256 and ranged == reached
    not_reached = (256 - len(reached)) // 2  # up and down
    assert artifact.receipt["quantization"]["experts_not_reached"] == not_reached


@pytest.mark.oracle
@pytest.mark.parametrize("family", EXPERTS)
def test_stacked_and_single_experts_are_the_same(family: str, tmp_path: Path) -> None:
    """transformers 5 writes the names of older releases, or its own if asked to."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**EXPERTS[family]))
    found = []
    for name, is_old in (("older", True), ("own", False)):
        model.save_pretrained(tmp_path / name, save_original_format=is_old)
        checkpoint = as_described(open_checkpoint(tmp_path / name))
        check_tensors(checkpoint, parse_config(checkpoint.config))
        found.append(checkpoint)
    for name in expected_tensors(parse_config(found[0].config)):
        np.testing.assert_array_equal(found[0].load(name), found[1].load(name))
