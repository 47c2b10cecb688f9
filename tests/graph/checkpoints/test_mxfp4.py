"""gpt-oss: experts in MXFP4 are read as transformers reads them, and kept without another rounding."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from export.model.families.architectures import as_described
from export.pipeline.export_model import ExportOptions, export_model
from export.sources.open import open_checkpoint
from export.storage.blocks import dequantize_rows
from runtime.backends.ort.native_session import open_cpu_session
from runtime.errors import InvalidCheckpoint
from tests.support.session_runs import LOGIT_TOLERANCE, run_in_pieces
from tests.support.tiny.experts import GPT_OSS

pytestmark = pytest.mark.oracle

NAMES = ("gate_up_proj", "down_proj")


class Model(NamedTuple):
    """A checkpoint in MXFP4, and what transformers makes of it: logits of some tokens, and layer 1's experts."""

    path: Path
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    weights: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**GPT_OSS)
    written = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    packed: dict[str, Any] = {}
    with torch.no_grad():
        for name, weights in written.named_parameters():
            if name.rpartition(".")[2] not in NAMES:
                weights.normal_(0, 0.3)
                continue
            experts, inputs, outputs = weights.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            weights.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
        ids = np.random.default_rng(1).integers(3, 320, 60)
        logits = written(torch.tensor(ids[None])).logits[0].numpy()
    path = tmp_path_factory.mktemp("mxfp4")
    written.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    whole = {name: tensors.pop(f"model.layers.1.mlp.experts.{name}").numpy() for name in NAMES}
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in NAMES}
    save_file({**kept, **packed}, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(raw))
    return Model(path, ids, logits, whole)


def test_the_integers_are_the_values_of_transformers(model: Model) -> None:
    checkpoint = as_described(open_checkpoint(model.path))
    for expert in range(6):
        for part, wanted in (
            ("gate_proj", model.weights["gate_up_proj"][expert, :, 0::2].T),
            ("up_proj", model.weights["gate_up_proj"][expert, :, 1::2].T),
            ("down_proj", model.weights["down_proj"][expert].T),
        ):
            name = f"model.layers.1.mlp.experts.{expert}.{part}.weight"
            np.testing.assert_array_equal(checkpoint.load(name), wanted)
            kept = checkpoint.imported(name)
            assert kept is not None and kept.blocks.bits == 8 and kept.input_order is None
            np.testing.assert_array_equal(dequantize_rows(kept.rows, bits=8), wanted)


@pytest.mark.parametrize("dialect", ["ort", "native"])
def test_the_logits_are_those_of_transformers(
    model: Model, dialect: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if dialect == "native":
        request.getfixturevalue("native_library")
    found = {}
    for precision in ("fp32", "imported"):
        out = tmp_path / precision
        artifact = export_model(ExportOptions(model=str(model.path), out=out, precision=precision, dialects=(dialect,)))
        assert artifact.passed
        session = open_cpu_session(artifact, dialect, num_slots=8, capacity=128)
        found[precision] = np.abs(run_in_pieces(session, model.ids, [60]) - model.logits)
    assert found["fp32"].max() < LOGIT_TOLERANCE
    # The weights are the same; activations of the experts are rounded to 8 bits, as in w8a16.
    assert 1e-6 < found["imported"].mean() < 0.03 * np.abs(model.logits).mean()


def test_a_scale_that_is_no_number_is_refused(model: Model, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model.path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][0, 0, 0] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((model.path / "config.json").read_bytes())
    with pytest.raises(InvalidCheckpoint, match="down_proj_scales has scales that are no numbers"):
        open_checkpoint(tmp_path).load("model.layers.1.mlp.experts.0.down_proj.weight")
