"""A GGUF file gives the tensors and config that Hugging Face has for the same model, or a reason why not."""

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from export.checkpoint.gguf.config import model_config
from export.checkpoint.gguf.file import GgufCheckpoint
from export.checkpoint.gguf.header import read_gguf_header
from export.model.families.architectures import parse_config
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.tiny.gguf import HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, TinyGguf, add_value, hugging_face_tensors

Kind = gguf.GGMLQuantizationType


def open_tiny(tmp_path: Path, **fields: Any) -> GgufCheckpoint:
    return GgufCheckpoint(TinyGguf(**fields).write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tensor_comes_back_under_its_name(tmp_path: Path, arch: str) -> None:
    biases = ("attn_q", "attn_k", "attn_v") if arch == "qwen2" else ()
    tensors = hugging_face_tensors(arch=arch, biases=biases)
    checkpoint = open_tiny(tmp_path, arch=arch, tensors=tensors)
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert checkpoint.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(checkpoint.load(name), expected, err_msg=name)


def test_biases_of_llama_are_reordered_with_their_rows(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(biases=("attn_q", "attn_k", "attn_v", "attn_output"))
    checkpoint = open_tiny(tmp_path, tensors=tensors)
    assert checkpoint.config["attention_bias"] is True
    for name in ("q", "k", "v", "o"):
        key = f"model.layers.1.self_attn.{name}_proj.bias"
        np.testing.assert_array_equal(checkpoint.load(key), tensors[key], err_msg=key)


def decodable() -> list[gguf.GGMLQuantizationType]:
    """The types that the library decodes: it has no list of them."""
    found = []
    for kind in Kind:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", decodable(), ids=lambda kind: kind.name)
def test_every_type_that_the_library_decodes_is_read(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = max(block_size, 256)
    # Bytes below 64, so that no scale in half precision is infinite.
    packed = np.random.default_rng(0).integers(0, 64, (6, columns // block_size * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for key, value in {**TinyGguf().metadata(), "llama.embedding_length": columns}.items():
        add_value(writer, key, value)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    name = "model.embed_tokens.weight"
    expected = np.concatenate([gguf.dequantize(row[None], kind) for row in packed])
    assert checkpoint.tensors[name] == ((6, columns), kind.name)
    np.testing.assert_array_equal(checkpoint.load(name), expected)
    np.testing.assert_array_equal(checkpoint.load_rows(name, 2, 5), expected[2:5])
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0], ids=lambda kind: kind.name)
def test_quantized_types_are_dequantized(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks lie along a row, so quantizing before or after the rows are reordered is the same."""
    monkeypatch.setattr("export.storage.tensor_file.CHUNK_BYTES", 100)
    tensors = hugging_face_tensors()
    checkpoint = open_tiny(tmp_path, tensors=tensors, kind=kind)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert checkpoint.tensors[name].dtype == kind.name
    expected = gguf.dequantize(gguf.quantize(tensors[name], kind), kind)
    np.testing.assert_array_equal(checkpoint.load(name), expected)
    for tensor in checkpoint.tensors:  # rows of q_proj and k_proj are reordered, the others read on their own
        np.testing.assert_array_equal(checkpoint.load_rows(tensor, 1, 3), checkpoint.load(tensor)[1:3], err_msg=tensor)


def test_config_has_hugging_face_fields(tmp_path: Path) -> None:
    config = open_tiny(tmp_path).config
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "num_hidden_layers": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": 6,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert math.isclose(config["rms_norm_eps"], 1e-5, rel_tol=1e-6)


def test_an_untied_head_is_a_tensor(tmp_path: Path) -> None:
    tensors = hugging_face_tensors(tied=False)
    checkpoint = open_tiny(tmp_path, tensors=tensors)
    assert checkpoint.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.load("lm_head.weight"), tensors["lm_head.weight"])


def test_every_way_to_end_is_an_eos(tmp_path: Path) -> None:
    """A listed end of turn counts, and so does a control token known to be one."""
    tokens = ["<unk>", "<s>", "</s>", "<end>", "x", "<|eot_id|>"]
    extra = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.token_type": [2, 3, 3, 3, 1, 3],
    }
    assert open_tiny(tmp_path, extra=extra).config["eos_token_id"] == [2, 3, 5]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"type": "none"}, {"rope_type": "default"}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, extra: dict[str, object], expected: dict[str, object]) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in extra.items()}
    rope = open_tiny(tmp_path, extra=metadata).config["rope_parameters"]
    assert rope == {"rope_theta": 10000.0} | expected


def llama3_divisors(factor: float, *, low: float = 1.0) -> NDArray[np.float32]:
    """What llama.cpp's converter stores for Llama 3.1 and later, one frequency at a time."""
    divisors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 500000.0 ** (2 * pair / HEAD_DIM)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / low:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (4.0 - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path, factor: float) -> None:
    checkpoint = open_tiny(
        tmp_path,
        extra={"llama.rope.freq_base": 500000.0},
        raw_tensors={"rope_freqs.weight": llama3_divisors(factor)},
    )
    assert checkpoint.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_divisors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight does not hold the divisors"):
        open_tiny(
            tmp_path,
            extra={"llama.rope.freq_base": 500000.0},
            raw_tensors={"rope_freqs.weight": llama3_divisors(8.0, low=0.5)},
        )


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            {"llama.rope.scaling.type": "longrope"},
            "'longrope' is not supported; supported: none, linear, yarn",
        ),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "without .*original_context"),
        ({"llama.rope.scaling.type": "linear"}, "factor is not a positive number"),
        (
            {"llama.rope.scaling.attn_factor": 0.5},
            r"llama\.rope\.scaling\.attn_factor = 0\.5 is not supported",
        ),
        ({"llama.expert_group_count": 8}, r"llama\.expert_group_count = 8 is not supported"),
        ({"llama.logit_scale": 0.1}, r"llama\.logit_scale"),
        ({"llama.attention.head_count": [4, 2]}, "differs between layers"),
        ({"llama.attention.head_count": None}, "head_count must be a positive integer, got None"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.*epsilon"),
        (
            {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16},
            "only models where they are equal",
        ),
        ({"general.type": "adapter"}, "'adapter', not a model"),
        ({"split.count": 3}, "one of 3 pieces"),
    ],
)
def test_settings_without_a_graph_are_refused_by_name(tmp_path: Path, extra: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=reason):
        open_tiny(tmp_path, extra=extra)


def test_an_unknown_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'rwkv6' is not supported; supported: llama, qwen2, qwen3"):
        open_tiny(tmp_path, arch="rwkv6")


def test_an_unknown_tensor_and_half_a_bias_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tensor 'blk\.0\.ffn_gate_exps\.weight' has no place"):
        open_tiny(tmp_path, raw_tensors={"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)})
    with pytest.raises(UnsupportedModel, match="must both have a bias"):
        open_tiny(tmp_path, raw_tensors={"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)})


def test_a_tensor_type_that_cannot_be_dequantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tensor blk\.0\.extra\.weight has type I32"):
        open_tiny(tmp_path, raw_tensors={"blk.0.extra.weight": np.ones(32, np.int32)})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"no tensor for 'model\.layers\.9"):
        open_tiny(tmp_path).load("model.layers.9.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04" * 8, "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "the other byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 2**60, 0, 0), "truncated or corrupt"),
        (
            b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"k", 9, 5) + struct.pack("<Q", 2**61),
            "truncated or",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "value type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"k", 9, 9) + bytes(8), "values of type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4), "is not UTF-8"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sIB", 1, b"k", 0, 1) * 2,
            "k is there twice",
        ),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=reason):
        open_checkpoint(file)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = TinyGguf().write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 1200, 7), *range(1200, len(whole) - 1, 4001), len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InvalidCheckpoint, match="truncated or corrupt"):
            GgufCheckpoint(cut)


def test_a_head_takes_no_more_memory_than_its_file(tmp_path: Path) -> None:
    """Arrays of numbers stay bytes, and what is announced is held against what a model can have."""
    numbers = np.arange(100_000, dtype=np.uint8)
    file = tmp_path / "bytes.gguf"
    head = b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"k", 9, 0) + struct.pack("<Q", numbers.size)
    file.write_bytes(head + numbers.tobytes())
    value = read_gguf_header(file).metadata["k"]
    assert value.nbytes == numbers.size
    np.testing.assert_array_equal(value, numbers)
    for content, reason in (
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 65_537), "65,537 keys are announced"),
        (b"GGUF" + struct.pack("<IQQ", 3, 65_537, 0), "65,537 tensors"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 4_000_001), "4,000,001 strings are announced"),
    ):
        file.write_bytes(content + bytes(64))
        with pytest.raises(InvalidCheckpoint, match=reason):
            read_gguf_header(file)


def test_a_head_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "long.gguf"
    with file.open("wb") as handle:
        handle.write(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 30))
        handle.truncate(2 << 30)  # sparse
    with pytest.raises(InvalidCheckpoint, match="metadata goes beyond 536,870,912 bytes"):
        read_gguf_header(file)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"llama.block_count": 4294967295}, "num_hidden_layers must be an integer from 1 to 1,024, got 4294967295"),
        ({"llama.block_count": "two"}, r"llama\.block_count must be a positive integer, got 'two'"),
        ({"split.count": "x"}, r"split\.count must be an integer, got 'x'"),
        ({"tokenizer.ggml.eos_token_id": math.nan}, "eos_token_id must be an integer, got nan"),
        ({"tokenizer.ggml.eot_token_id": 6}, "eos, eot or eom_token_id 6 is outside the vocabulary of 6 tokens"),
        ({"tokenizer.ggml.bos_token_id": 6}, "bos_token_id 6 is outside"),
        ({"llama.rope.freq_base": math.inf}, "freq_base must be a finite number, got inf"),
        ({"general.architecture": 5}, "must be a string, got 5"),
        ({"llama.expert_count": [0, 0]}, "llama.expert_count = "),
    ],
)
def test_metadata_of_another_type_is_named(tmp_path: Path, extra: dict[str, object], reason: str) -> None:
    file = TinyGguf(extra={key: value for key, value in extra.items() if key != "general.architecture"})
    header = read_gguf_header(file.write(tmp_path / "tiny.gguf"))
    shapes = {name: place.shape for name, place in header.tensors.items()}
    with pytest.raises(InvalidCheckpoint, match=reason):
        parse_config(model_config(header.metadata | extra, shapes, {}, "tiny.gguf"))


def test_divisors_that_do_not_fit_the_heads_are_refused(tmp_path: Path) -> None:
    divisors = np.full(HEAD_DIM, 2, np.float32)
    with pytest.raises(InvalidCheckpoint, match=r"rope_freqs\.weight of shape \[16\].* head_dim 16"):
        open_tiny(tmp_path, raw_tensors={"rope_freqs.weight": divisors})
