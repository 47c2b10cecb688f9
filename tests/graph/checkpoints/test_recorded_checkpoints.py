"""Checkpoints that the quantization tools themselves wrote: weights and logits are the tool's own.

The files in tests/support/tiny/recorded/ come from record.py beside them, which ran each tool on a tiny model.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export.model.checks.model_reading import read_model
from export.model.families.architectures import as_described
from export.model.reference.forward import run_reference
from export.pipeline.export_model import ExportOptions, export_model
from export.sources.open import open_checkpoint
from export.storage.blocks import QuantizedRows, dequantize_rows
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.native_session import open_cpu_session
from runtime.backends.ort.session import OrtSession
from runtime.errors import InvalidSetting
from tests.support.session_runs import run_in_pieces
from tests.support.tiny.recorded.record import HERE, IDS

FOLDERS = [path.parent for path in HERE.glob("*/*/expected.safetensors") if path.parent.parent.name != "peft"]
CASES = sorted(f"{folder.parent.name}/{folder.name}" for folder in FOLDERS)
assert len(CASES) >= 30, "the recorded checkpoints are missing: nothing would be tested"


def logits_of(directory: Path) -> NDArray[np.float32]:
    checkpoint = open_checkpoint(directory)
    config = read_model(checkpoint)
    return run_reference(as_described(checkpoint), config, [IDS]).logits(0, 0, len(IDS))


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    model = onnx.load(path / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def stored_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every weight of an artifact that is stored as integers, as float32 in the order of the model's inputs."""
    tensors, found = initializers(path), {}
    for name, values in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind in ("q4", "q8"):
            rows = QuantizedRows(values, tensors[f"{base}.scales"], tensors.get(f"{base}.zero_points"))
            found[base] = dequantize_rows(rows, bits=int(kind[1]))
            if (order := tensors.get(f"{base}.input_order")) is not None:
                found[base] = found[base][:, np.argsort(order)]
        elif kind == "int8":
            found[base] = (values * tensors[f"{name}.scales"]).T.astype(np.float32)
    return found


def ort_logits(path: Path) -> NDArray[np.float32]:
    session = OrtSession.open(open_artifact(path), num_slots=4, capacity=32)
    return run_in_pieces(session, np.array(IDS), [len(IDS)])


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_the_tools_own(case: str) -> None:
    checkpoint, expected = open_checkpoint(HERE / case), load_file(HERE / case / "expected.safetensors")
    logits = expected.pop("logits")
    for name, weight in expected.items():
        # Tools multiply in another order than (value - zero) * scale: a unit in the last place or two, of float32.
        np.testing.assert_allclose(checkpoint.load(name), weight, rtol=5e-7, atol=0, err_msg=name)
    np.testing.assert_allclose(logits_of(HERE / case), logits, atol=1e-4)  # float32 sums in another order


def exported(case: str, out: Path, precision: str = "imported") -> Artifact:
    """Random weights in few bits fail gates that are made for trained models: only what the files hold is compared."""
    return export_model(ExportOptions(model=str(HERE / case), out=out, precision=precision, force=True))


INTEGERS = {
    "auto-round/auto-awq": "w4a16",
    "auto-round/auto-gptq-3-bits": "w4a16",
    "auto-round/mixed": "w4a16",
    "bitsandbytes/int8": "w8a16",
    "compressed-tensors/w4a16": "w4a16",
    "compressed-tensors/w4a16-asymmetric": "w4a16",
    "compressed-tensors/w4a16-channel": "w4a16",
    "compressed-tensors/w8a8-dynamic": "w8a16",
    "compressed-tensors/w8a8-static": "w8a8",
    "modelopt/int8-weights": "w8a16",
}


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_reach_the_artifact_without_another_rounding(tmp_path: Path, case: str) -> None:
    checkpoint, artifact = open_checkpoint(HERE / case), exported(case, tmp_path / "out")
    assert artifact.manifest.precision == INTEGERS[case]
    layers = stored_weights(tmp_path / "out")
    prefix = "model.layers.0"
    for name, parts in (
        (f"{prefix}.self_attn.q_proj.weight+2", [f"self_attn.{part}_proj" for part in "qkv"]),
        (f"{prefix}.mlp.down_proj.weight", ["mlp.down_proj"]),
        *([("lm_head.weight", [])] if checkpoint.imported("lm_head.weight") is not None else []),
    ):
        names = [f"{prefix}.{part}.weight" for part in parts] or [name]
        np.testing.assert_array_equal(layers[name], np.concatenate([checkpoint.load(each) for each in names]))
    # The graph rounds inputs to int8 for each block, or once with the tool's scale; with other weights, the difference
    # is more than a deviation.
    expected = load_file(HERE / case / "expected.safetensors")["logits"]
    assert np.abs(ort_logits(tmp_path / "out") - expected).max() < 0.2 * expected.std()


def test_static_scales_of_inputs_become_those_of_w8a8(tmp_path: Path) -> None:
    case = "compressed-tensors/w8a8-static"
    exported(case, tmp_path / "out")
    tensors, stored = initializers(tmp_path / "out"), load_file(HERE / case / "model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"{module}.weight.int8"], stored[f"{module}.weight"].T)
    scale = [value for name, value in tensors.items() if name == "layers.0.down.scale"]
    assert float(scale[0]) == float(stored[f"{module}.input_scale"][0])


def test_weights_only_of_a_static_checkpoint(tmp_path: Path) -> None:
    artifact = exported("compressed-tensors/w8a8-static", tmp_path / "out", "w8a16")
    assert artifact.manifest.precision == "w8a16"
    assert "model.layers.0.mlp.down_proj.weight.q8" in initializers(tmp_path / "out")


@pytest.mark.parametrize("case", ["bitsandbytes/nf4", "compressed-tensors/fp8-block", "hqq/4-bits", "modelopt/nvfp4"])
def test_what_no_integers_hold_is_widened_with_a_word(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = export_model(ExportOptions(model=str(HERE / case), out=tmp_path / "out"))
    assert artifact.receipt["passed"]
    assert "weights are widened, because no artifact holds them as they are" in capsys.readouterr().err
    with pytest.raises(InvalidSetting, match="this one has none"):
        exported(case, tmp_path / "other")


def test_layers_with_integers_stay_beside_those_that_are_widened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(HERE / "modelopt/int4-awq")
    (note,) = checkpoint.notes
    assert "2 of 7 layers: modelopt AWQ int4 weights are widened" in note
    exported("modelopt/int4-awq", tmp_path / "out")
    layers = stored_weights(tmp_path / "out")
    assert {name.partition(".0.")[2] for name in layers} == {"self_attn.q_proj.weight+2", "mlp.gate_proj.weight+1"}


def test_int8_weights_without_input_scales_are_not_called_w8a8(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="w8a8 would round them once more; choose imported, w8a16"):
        exported("compressed-tensors/w8a8-dynamic", tmp_path / "out", "w8a8")


def test_the_lowest_int8_weight_is_kept_in_native_graphs(tmp_path: Path, native_library: object) -> None:
    """Tools use -128, which this project's own rounding does not."""
    source = tmp_path / "model"
    shutil.copytree(HERE / "compressed-tensors" / "w8a8-static", source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"][:, ::3] = -128
    save_file(tensors, source / "model.safetensors")
    logits = {}
    for dialect in ("ort", "native"):
        options = ExportOptions(
            model=str(source), out=tmp_path / dialect, precision="imported", force=True, dialects=(dialect,)
        )
        export_model(options)
        session = open_cpu_session(
            open_artifact(tmp_path / dialect, allow_failed=True), dialect, num_slots=4, capacity=32
        )
        logits[dialect] = run_in_pieces(session, np.array(IDS), [len(IDS)])
    # Both round inputs to the same steps. Where a value is near a half, one is a step from the other, and the rest of
    # that row with it; a sum that saturates would be in every row.
    close = np.abs(logits["ort"] - logits["native"]).max(-1) < 1e-5
    assert close.mean() > 0.5
