"""--verify: the receipt says what the model was compared with; transformers sees what the numpy reference cannot."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import export.model.checks.model_reading
from export.model.description import ModelConfig
from export.model.families.architectures import parse_config
from export.sources.open import open_checkpoint
from export.verify.references import TransformersReference, check_reference
from headrace import main
from runtime.artifact.manifest import open_artifact
from runtime.errors import InvalidCheckpoint, InvalidSetting
from tests.support.tiny.checkpoint import config_of, write_checkpoint


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def exported(model: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["export", str(model), "--out", str(out), *flags]) == 0
    return dict(open_artifact(out).receipt)


def test_the_receipt_names_the_numpy_reference_and_what_it_shares_with_the_graph(tmp_path: Path) -> None:
    receipt = exported(write_checkpoint(tmp_path / "model", config_of("llama")), tmp_path / "artifact")
    assert "export/model/reference/ (numpy), which shares the reading of config.json" in receipt["reference"]
    assert receipt["source"] == "model" and receipt["commit"] is None


@pytest.mark.parametrize("variant", ["qwen2-yarn", "mistral-sliding"])
def test_transformers_agrees_to_the_fourth_digit(transformers: Any, tmp_path: Path, variant: str) -> None:
    """The gate of fp32 is 1e-3 on logits whose largest are near 10; measured were 2e-5 and less."""
    model = write_checkpoint(tmp_path / "model", config_of(variant, num_hidden_layers=2))
    receipt = exported(model, tmp_path / "artifact", "--verify", "transformers")
    assert f"by transformers {transformers.__version__} (torch " in receipt["reference"]
    figures = receipt["figures"]
    assert figures["max_logit_error"] < 1e-4 and figures["greedy_agreement"] == 1.0


def test_a_config_that_is_misread_passes_numpy_and_not_transformers(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Graph and numpy reference read the config with one function: what that gets wrong, both get wrong."""

    def misread(config: Any) -> ModelConfig:
        return parse_config({**config, "rope_theta": 9.0})

    monkeypatch.setattr(export.model.checks.model_reading, "parse_config", misread)
    model = write_checkpoint(tmp_path / "model", config_of("llama", num_hidden_layers=2, rope_theta=1e6))
    assert exported(model, tmp_path / "artifact")["passed"]
    command = ["export", str(model), "--out", str(tmp_path / "other"), "--verify", "transformers"]
    assert main(command) == 2
    assert "fp32 is too far from the reference: max_logit_error is" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_tensor_that_transformers_would_leave_out_is_refused(transformers: Any, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config_of("llama-biases", num_hidden_layers=1))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    reference = TransformersReference(str(model), open_checkpoint(model))
    refused = pytest.raises(InvalidCheckpoint, match=r"transformers finds unexpected keys in model, .*bias and \d more")
    with refused, reference.run([[1, 2, 3]], tmp_path):
        pass


def test_without_transformers_it_is_one_line_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["export", str(tmp_path / "nowhere"), "--verify", "transformers", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--verify transformers needs torch and transformers" in line and "pip install 'headrace[oracle]'" in line


def test_another_reference_is_unknown() -> None:
    with pytest.raises(InvalidSetting, match="--verify torch is unknown; choose from numpy, transformers"):
        check_reference("torch")
