"""fp8, fp4 and powers of two as scales: every stored form is read as its public definition says."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from export.checkpoint.protocol import Checkpoint
from export.checkpoint.quantized.stored_layer import unpack_words
from export.checkpoint.safetensors_files import SINGLE
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint, UnsupportedModel

FP8 = ml_dtypes.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float32": "F32", "uint8": "U8", "int8": "I8"}


def write(directory: Path, tensors: dict[str, NDArray[Any]], config: dict[str, Any]) -> Checkpoint:
    """A directory with these tensors, in types that safetensors' numpy writer does not know."""
    header, blobs, offset = {}, [], 0
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": TYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]
        }  # fmt: skip
        blobs.append(blob)
        offset += len(blob)
    head = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return open_checkpoint(directory)


def random_fp8(*shape: int) -> NDArray[Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(FP8)


def random_scales(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(0.01, 0.1, shape).astype(np.float32)


@pytest.mark.parametrize("is_power", [False, True])
def test_blocks_whose_edges_are_cut(tmp_path: Path, is_power: bool) -> None:
    """DeepSeek's form: 200 x 150 in blocks of 64 x 48, so the last are smaller. Newer files have powers of two."""
    weight, scales = random_fp8(200, 150), random_scales(4, 4)
    stored = scales.astype(ml_dtypes.float8_e8m0fnu) if is_power else scales
    checkpoint = write(
        tmp_path,
        {"a.weight": weight, "a.weight_scale_inv": stored, "a.input_scale": random_scales(1)},
        {"quant_method": "fp8", "weight_block_size": [64, 48], "activation_scheme": "dynamic", "fmt": "e4m3"},
    )
    expected = np.empty((200, 150), np.float32)
    for row in range(200):
        for column in range(150):
            scale = np.float32(stored[row // 64, column // 48])
            expected[row, column] = np.float32(weight[row, column]) * scale
    np.testing.assert_array_equal(checkpoint.load("a.weight"), expected)
    assert set(checkpoint.tensors) == {"a.weight"}
    assert checkpoint.stored_bits is None


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_a_scale_for_the_matrix_or_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scales = random_fp8(6, 8), random_scales(*shape)
    checkpoint = write(tmp_path, {"a.weight": weight, "a.weight_scale": scales}, {"quant_method": "fbgemm_fp8"})
    rows = scales.reshape(-1, 1) if scales.size > 1 else scales.reshape(())
    np.testing.assert_array_equal(checkpoint.load("a.weight"), weight.astype(np.float32) * rows)


def test_mx_formats(tmp_path: Path) -> None:
    """32 values share a power of two, which is stored as its exponent plus 127."""
    rng = np.random.default_rng(2)
    packed, exponents = rng.integers(0, 256, (3, 32), np.uint8), rng.integers(120, 130, (3, 2), np.uint8)
    config = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
    }
    checkpoint = write(tmp_path, {"a.weight_packed": packed, "a.weight_scale": exponents}, config)
    expected = np.empty((3, 64), np.float32)
    for row in range(3):
        for column in range(64):
            code = int(packed[row, column // 2]) >> (4 * (column % 2)) & 15
            value = E2M1[code & 7] * (-1 if code & 8 else 1)
            expected[row, column] = value * 2.0 ** (int(exponents[row, column // 32]) - 127)
    np.testing.assert_array_equal(checkpoint.load("a.weight"), expected)


def test_a_configuration_of_modelopt_in_its_own_file(tmp_path: Path) -> None:
    weight, scale = random_fp8(4, 8), np.array(0.25, np.float32)
    write(tmp_path, {"a.weight": weight, "a.weight_scale": scale}, {"quant_method": "modelopt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.load("a.weight"), weight.astype(np.float32) / 4)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weight = random_fp8(6, 8)
    config = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    with pytest.raises(InvalidCheckpoint, match=r"a\.weight is F8_E4M3 and has no weight_scale_inv"):
        write(tmp_path, {"a.weight": weight}, config)
    checkpoint = write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": random_scales(2, 3)}, config)
    with pytest.raises(
        InvalidCheckpoint, match=r"a: scales \[2, 3\] do not fit a weight \[6, 8\] in blocks of \[4, 4\]"
    ):
        checkpoint.load("a.weight")
    with pytest.raises(InvalidCheckpoint, match="weight_block_size must be two sizes, got 'x'"):
        write(tmp_path, {"a.weight": weight}, {**config, "weight_block_size": "x"})
    with pytest.raises(UnsupportedModel, match="rotation = 'hadamard'"):
        write(tmp_path, {"a.weight": weight}, {**config, "rotation": "hadamard"})
    broken = weight.copy()
    broken[2, 3] = np.nan
    checkpoint = write(tmp_path, {"a.weight": broken, "a.weight_scale": random_scales(1)}, config)
    with pytest.raises(InvalidCheckpoint, match=r"a\.weight \(fp8\) holds NaN or infinity"):
        checkpoint.load("a.weight")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_in_words(bits: int) -> None:
    """The lowest bits first; three bits run on from one word to the next."""
    values = np.random.default_rng(3).integers(0, 2**bits, (5, 64), np.uint8)
    words = np.zeros((5, 64 * bits // 32), np.uint32)
    for row in range(5):
        number = sum(int(value) << (bits * idx) for idx, value in enumerate(values[row]))
        words[row] = [number >> (32 * idx) & 0xFFFFFFFF for idx in range(words.shape[1])]
    np.testing.assert_array_equal(unpack_words(words.view(np.int32), bits), values)
