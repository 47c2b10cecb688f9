"""Checkpoints of GPTQ and AWQ tools: every packing is read exactly, and other formats are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.calibration.dataset import CalibrationOptions
from export.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from export.schemes.registry import scheme_named
from export.sources.open import open_checkpoint
from export.storage.blocks import QuantizedRows, dequantize_rows
from export.storage.quantized_rows import Codes, stacked, to_blocks
from runtime.errors import InvalidCheckpoint, InvalidSetting, UnsupportedModel
from tests.support.tiny.checkpoint import config_of
from tests.support.tiny.quantized import Packing, write_quantized

PACKINGS = {
    "gptq": Packing(),
    "gptq asymmetric": Packing(sym=False),
    "gptq v2 asymmetric": Packing(sym=False, checkpoint_format="gptq_v2"),
    "gptq v2 called v1": Packing(checkpoint_format="gptq_v2", declares_format=False),
    "gptq without format and g_idx": Packing(declares_format=False, has_g_idx=False, group_size=64),
    "gptq act-order": Packing(desc_act=True),
    "gptq act-order asymmetric v2": Packing(desc_act=True, sym=False, checkpoint_format="gptq_v2", group_size=64),
    "gptq 8 bits": Packing(bits=8, group_size=64),
    "gptq 8 bits asymmetric": Packing(bits=8, sym=False, group_size=32),
    "gptq 8 bits act-order": Packing(bits=8, sym=False, desc_act=True, group_size=32),
    "gptq groups of 128": Packing(group_size=128),
    "gptq whole rows": Packing(group_size=-1),
    "gptq whole rows asymmetric": Packing(group_size=-1, sym=False, bits=8),
    "awq": Packing(method="awq"),
    "awq groups of 64": Packing(method="awq", group_size=64),
    "awq groups of 128": Packing(method="awq", group_size=128),
    "awq whole rows": Packing(method="awq", group_size=-1),
}
CONFIG = config_of("llama", hidden_size=128, intermediate_size=256)
SMALL = {**CONFIG, "num_hidden_layers": 2, "max_position_embeddings": 64}


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    model = onnx.load(path / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def dequantized_layers(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every MatMulNBits weight of an artifact by name, as float32 in the checkpoint's order of inputs."""
    tensors = initializers(path)
    found = {}
    for name, values in tensors.items():
        base, _, bits = name.rpartition(".q")
        if base and bits.isdigit():
            rows = QuantizedRows(values, tensors[f"{base}.scales"], tensors.get(f"{base}.zero_points"))
            matrix = dequantize_rows(rows, bits=int(bits))
            if (order := tensors.get(f"{base}.input_order")) is not None:
                matrix = matrix[:, np.argsort(order)]
            found[base] = matrix
    return found


@pytest.mark.parametrize("name", PACKINGS)
def test_an_artifact_holds_the_checkpoints_own_weights(tmp_path: Path, name: str) -> None:
    packing = PACKINGS[name]
    weights = write_quantized(tmp_path / "model", SMALL, packing)
    checkpoint = open_checkpoint(tmp_path / "model")
    for weight, matrix in weights.items():
        np.testing.assert_array_equal(checkpoint.load(weight), matrix, err_msg=weight)
    artifact = export_model(ExportOptions(model=str(tmp_path / "model"), out=tmp_path / "out", precision="imported"))
    assert artifact.manifest.precision == f"w{packing.bits}a16"
    layers = dequantized_layers(tmp_path / "out")
    assert len(layers) == 4 * SMALL["num_hidden_layers"]
    for layer in range(SMALL["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        qkv = [weights[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"]
        gate_up = [weights[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        expected = {
            f"{prefix}.self_attn.q_proj.weight+2": np.concatenate(qkv),
            f"{prefix}.self_attn.o_proj.weight": weights[f"{prefix}.self_attn.o_proj.weight"],
            f"{prefix}.mlp.gate_proj.weight+1": np.concatenate(gate_up),
            f"{prefix}.mlp.down_proj.weight": weights[f"{prefix}.mlp.down_proj.weight"],
        }
        for weight, matrix in expected.items():
            np.testing.assert_array_equal(layers[weight], matrix, err_msg=weight)
    embedding = initializers(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, weights["model.embed_tokens.weight"])


def test_float32_of_a_quantized_checkpoint_is_exact(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", CONFIG, PACKINGS["gptq act-order"])
    artifact = export_model(ExportOptions(model=str(tmp_path / "model"), out=tmp_path / "out", precision="fp32"))
    assert artifact.receipt["figures"]["max_logit_error"] < 1e-4
    assert not dequantized_layers(tmp_path / "out")


def test_the_precision_of_the_same_bits_keeps_the_layers_and_rounds_the_rest(tmp_path: Path) -> None:
    weights = write_quantized(tmp_path / "model", CONFIG, PACKINGS["awq"])
    export_model(ExportOptions(model=str(tmp_path / "model"), out=tmp_path / "out", precision="w4a16"))
    layers = dequantized_layers(tmp_path / "out")
    down = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(layers[down], weights[down])
    head = layers["lm_head.weight"] - weights["lm_head.weight"]
    assert 0 < np.abs(head).max() < 0.02


def test_calibration_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", CONFIG, PACKINGS["awq"])
    quantization = QuantizationOptions(text=CalibrationOptions(num_samples=4))
    options = ExportOptions(
        model=str(tmp_path / "model"), out=tmp_path / "out", precision="w4a16", quantization=quantization
    )
    with pytest.raises(InvalidSetting, match="quantized already and w4a16 keeps its integers: calibration flags"):
        export_model(options)


def test_a_layer_left_in_floats_stays_so_and_takes_its_sisters_along(tmp_path: Path) -> None:
    keep = ("1.self_attn.k_proj.weight", "2.mlp.down_proj.weight")
    weights = write_quantized(tmp_path / "model", CONFIG, PACKINGS["gptq"], keep=keep)
    export_model(ExportOptions(model=str(tmp_path / "model"), out=tmp_path / "out", precision="imported"))
    layers, tensors = dequantized_layers(tmp_path / "out"), initializers(tmp_path / "out")
    assert "model.layers.1.self_attn.q_proj.weight+2" not in layers
    assert "model.layers.0.self_attn.q_proj.weight+2" in layers
    qkv = np.concatenate([weights[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight+2"], qkv.T)
    down = "model.layers.2.mlp.down_proj.weight"
    np.testing.assert_array_equal(tensors[down], weights[down].T)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_repacking_loses_nothing(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    group_size, num_groups = data.draw(st.sampled_from([16, 32, 48, 96, 128, 256])), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n, k = 6, group_size * num_groups
    group_of = np.arange(k) // group_size
    if data.draw(st.booleans()):
        group_of = rng.permutation(group_of)
    zeros = rng.integers(0, 2**bits, (n, num_groups), np.uint8)
    if data.draw(st.booleans()):
        zeros[:] = 2 ** (bits - 1)
    scales = rng.standard_normal((n, num_groups)).astype(np.float16).astype(np.float32)
    codes = Codes(rng.integers(0, 2**bits, (n, k), np.uint8), zeros, scales, group_of)
    imported = to_blocks(codes, bits=bits, name="x")
    np.testing.assert_array_equal(imported.dequantized(), codes.dequantized())
    both = stacked([imported, imported])
    assert both is not None
    np.testing.assert_array_equal(both.dequantized(), np.concatenate([codes.dequantized()] * 2))


def test_matrices_that_do_not_belong_together_are_not_stacked() -> None:
    rng = np.random.default_rng(0)
    values, scales = rng.integers(0, 16, (4, 64), np.uint8), np.ones((4, 2), np.float32)
    middle, straight = np.full((4, 2), 8, np.uint8), np.arange(64) // 32
    plain = to_blocks(Codes(values, middle, scales, straight), bits=4, name="x")
    shuffled = to_blocks(Codes(values, middle, scales, rng.permutation(straight)), bits=4, name="x")
    assert stacked([plain, shuffled]) is None
    asymmetric = to_blocks(Codes(values, middle - np.uint8(3), scales, straight), bits=4, name="x")
    mixed = stacked([plain, asymmetric])
    assert mixed is not None
    np.testing.assert_array_equal(mixed.dequantized()[4:], asymmetric.dequantized())
    np.testing.assert_array_equal(mixed.dequantized()[:4], plain.dequantized())


def test_groups_that_fit_no_block_are_refused() -> None:
    codes = Codes(
        np.zeros((2, 48), np.uint8), np.zeros((2, 2), np.uint8), np.ones((2, 2), np.float32), np.arange(48) // 24
    )
    with pytest.raises(UnsupportedModel, match=r"down has rows of 48 in groups of 24: no block"):
        to_blocks(codes, bits=4, name="down")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": ({**Packing().config(), "rotation": "hadamard"}, "rotation = 'hadamard'"),
    "eetq": ({"quant_method": "eetq"}, "quant_method 'eetq'"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "compressed-tensors in the format None"),
    "no method": ({"bits": 4}, "quant_method None"),
    "five bits": ({"quant_method": "gptq", "bits": 5}, "gptq with bits 5"),
    "auto-round in another packing": (
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"},
        "packing_format 'auto_round:fp8_static'",
    ),
    "auto-round with activations": ({"quant_method": "auto-round", "bits": 4, "act_bits": 8}, "act_bits 8"),
    "sparse": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        "sparsity_config",
    ),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "old marlin": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format True"),
    "per module": ({"quant_method": "gptq", "bits": 4, "dynamic": {".*": {"bits": 5}}}, "gptq with bits 5"),
    "awq 8 bits": ({"quant_method": "awq", "bits": 8}, "awq with bits 8"),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "awq in version 'gemv'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_imported_is_named_with_what_is(tmp_path: Path, case: str) -> None:
    write_quantized(tmp_path, CONFIG, Packing())
    raw, words = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": raw}))
    with pytest.raises(UnsupportedModel) as caught:
        open_checkpoint(tmp_path)
    assert words in str(caught.value)
    assert "awq (4 bits, version gemm), auto-round, compressed-tensors, bitsandbytes, fp8, modelopt and hqq" in str(
        caught.value
    )


INCONSISTENT: dict[str, tuple[dict[str, Any], str]] = {
    "group size": ({"group_size": 64}, r"do not fit gptq, 4 bits, a scale per group of 64"),
    "bits": ({"bits": 8}, "do not fit gptq, 8 bits"),
    "group size of zero": ({"group_size": 0}, "group_size must be -1 or at least 1, got 0"),
    "packing": ({"quant_method": "awq", "version": "gemm"}, "do not fit awq"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_a_config_that_does_not_fit_the_tensors_is_refused(tmp_path: Path, case: str) -> None:
    packing = Packing()
    write_quantized(tmp_path, CONFIG, packing)
    changes, words = INCONSISTENT[case]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": packing.config() | changes}))
    with pytest.raises(InvalidCheckpoint, match=words):
        open_checkpoint(tmp_path)


def test_zero_points_that_say_neither_format_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    write_quantized(tmp_path / "a", CONFIG, Packing(sym=False))
    config = Packing(sym=True).config()
    (tmp_path / "a" / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    with pytest.raises(UnsupportedModel, match="zero points other than 8, though quantization_config says sym"):
        open_checkpoint(tmp_path / "a").load(name)
    write_quantized(tmp_path / "b", CONFIG, Packing(sym=False, checkpoint_format="gptq_v2"))
    config = Packing(sym=False).config()
    (tmp_path / "b" / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    with pytest.raises(UnsupportedModel, match="a zero point stored as 15"):
        open_checkpoint(tmp_path / "b").load(name)


def test_the_choice_of_precision_knows_the_stored_bits() -> None:
    assert scheme_named("imported", stored_bits=8).name == "w8a16"
    assert scheme_named("w4a16", stored_bits=4).keeps_stored
    assert not scheme_named("fp32", stored_bits=4).keeps_stored
    with pytest.raises(InvalidSetting, match="w8a16 would round them once more; choose imported, w4a16"):
        scheme_named("w8a16", stored_bits=4)
    with pytest.raises(InvalidSetting, match="quantized already"):
        scheme_named("imported")


def test_a_quantized_checkpoint_looks_like_any_other(tmp_path: Path) -> None:
    weights = write_quantized(tmp_path, CONFIG, PACKINGS["awq"])
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: array.shape for name, array in weights.items()
    }
    assert checkpoint.imported("model.embed_tokens.weight") is None
