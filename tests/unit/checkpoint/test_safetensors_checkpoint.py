"""A Hugging Face directory is read exactly and lazily, and a broken one is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint, UnsupportedModel

CONFIG = {"model_type": "llama", "hidden_size": 8}
STORED = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def random_tensors(dtype: np.dtype[Any], seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (7, 5), "b.weight": (3,), "c.weight": (2, 3, 4), "scalar": ()}
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def write_config(path: Path, **extra: object) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG | extra))


def write_single(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    write_config(path)
    save_file(tensors, path / "model.safetensors")


def write_sharded(path: Path, shards: list[dict[str, NDArray[Any]]]) -> None:
    write_config(path)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_every_tensor_is_widened_exactly(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    tensors = random_tensors(dtype)
    write_single(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == np.float32
        assert checkpoint.tensors[name].shape == loaded.shape == expected.shape
        np.testing.assert_array_equal(loaded, expected.astype(np.float32))


def test_a_tensor_longer_than_a_chunk_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.storage.tensor_file.CHUNK_BYTES", 10)  # not a multiple of any row
    tensors = random_tensors(np.dtype(ml_dtypes.bfloat16))
    write_single(tmp_path, tensors)
    np.testing.assert_array_equal(
        SafetensorsCheckpoint(tmp_path).load("a.weight"), tensors["a.weight"].astype(np.float32)
    )


def test_an_empty_tensor_is_empty(tmp_path: Path) -> None:
    write_single(tmp_path, {"none": np.zeros((0, 4), dtype=np.float32)})
    assert SafetensorsCheckpoint(tmp_path).load("none").shape == (0, 4)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    first = {"a": np.ones((2, 2), np.float32)}
    second = {"b": np.full((3,), 2, np.float16)}
    write_sharded(tmp_path, [first, second])
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert {name: info.dtype for name, info in checkpoint.tensors.items()} == {"a": "F32", "b": "F16"}
    np.testing.assert_array_equal(checkpoint.load("a"), first["a"])
    np.testing.assert_array_equal(checkpoint.load("b"), second["b"])


def test_config_and_text_files_pass_through(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors(STORED[0]))
    (tmp_path / "tokenizer.json").write_text('{"é": 1}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ own }}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ older }}"}')
    (tmp_path / "special_tokens_map.json").write_text("{}")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.config == CONFIG
    assert checkpoint.source == tmp_path.name
    files = checkpoint.text_files()
    assert set(files) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
    }  # fmt: skip
    assert files["tokenizer.json"] == '{"é": 1}'
    assert files["chat_template.jinja"] == "{{ own }}"


def test_one_embedded_chat_template_becomes_a_file(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors(STORED[0]))
    for template in ("{{ x }}", [{"name": "default", "template": "{{ x }}"}], {"default": "{{ x }}"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert SafetensorsCheckpoint(tmp_path).text_files()["chat_template.jinja"] == "{{ x }}"


def test_several_chat_templates_become_one_list(tmp_path: Path) -> None:
    """Wherever they stand: files of their own win over tokenizer_config.json, as in transformers."""
    write_single(tmp_path, random_tensors(STORED[0]))
    named = [{"name": "default", "template": "{{ x }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "eos_token": "</s>"}))
    embedded = SafetensorsCheckpoint(tmp_path).text_files()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "older", "eos_token": "</s>"}))
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    for files in (embedded, SafetensorsCheckpoint(tmp_path).text_files()):
        assert set(files) == {"tokenizer_config.json"}
        assert json.loads(files["tokenizer_config.json"]) == {"chat_template": named, "eos_token": "</s>"}


def test_a_template_file_stands_for_every_embedded_template(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors(STORED[0]))
    named = [{"name": "default", "template": "older"}, {"name": "tool_use", "template": "older"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    files = SafetensorsCheckpoint(tmp_path).text_files()
    assert files["chat_template.jinja"] == "{{ x }}"
    assert json.loads(files["tokenizer_config.json"]) == {"chat_template": None}


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InvalidCheckpoint, match=r"pickled weights.*save_pretrained"):
        SafetensorsCheckpoint(tmp_path)


def test_an_adapter_is_named_as_one(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="adapter"):
        SafetensorsCheckpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=r"neither model\.safetensors nor"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_config(tmp_path: Path, content: str | bytes | None, reason: str) -> None:
    write_single(tmp_path, random_tensors(STORED[0]))
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidCheckpoint, match=reason):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("cut", [1, 40])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    write_single(tmp_path, random_tensors(STORED[0]))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(InvalidCheckpoint, match="not a whole safetensors file"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]"])
def test_a_corrupt_header_is_refused(tmp_path: Path, content: bytes) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match="not a whole safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_cut_after_opening_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": np.ones((64,), np.float32)})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match="100 more belong here"):
        checkpoint.load("a")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": np.ones(1, np.float32)}, {"b": np.ones(1, np.float32)}])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match="lacks 1 of 2 shards: model-00002"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_beside_an_index_that_names_others_is_ambiguous(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": np.ones(1, np.float32)}])
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        InvalidCheckpoint, match=r"both model\.safetensors and .* \(model-00001-of-00001\.safetensors\)"
    ):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert SafetensorsCheckpoint(tmp_path).load("a")[0] == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_whole_set_of_shards_needs_no_index(tmp_path: Path, count: int) -> None:
    write_sharded(tmp_path, [{f"t{number}": np.full(2, number, np.float32)} for number in range(count)])
    (tmp_path / "model.safetensors.index.json").unlink()
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert [checkpoint.load(f"t{number}")[1] for number in range(count)] == list(range(count))


def test_half_a_set_of_shards_without_an_index_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{f"t{number}": np.ones(2, np.float32)} for number in range(3)])
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match="lacks 1 of 3 shards: model-00002-of-00003"):
        SafetensorsCheckpoint(tmp_path)


def test_the_only_file_is_read_and_of_several_none(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert set(SafetensorsCheckpoint(tmp_path).tensors) == {"a"}
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"several files .*\(consolidated\.safetensors, gptq_model"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["model-00001-of-00000.safetensors", "model-00001-of-99999999.safetensors"])
def test_a_shard_whose_name_makes_no_sense_is_refused(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / name)
    with pytest.raises(InvalidCheckpoint, match="has 1 shards, and the name model-00001-of-"):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_there_and_one_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": np.ones(1, np.float32)}, {"b": np.ones(1, np.float32)}])
    save_file(
        {"b": np.ones(1, np.float32), "c": np.full(1, 3, np.float32)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    assert SafetensorsCheckpoint(tmp_path).load("c")[0] == 3
    save_file({name: np.ones(1, np.float32) for name in "ab"}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InvalidCheckpoint, match="'a' twice: in model-00001-of-00002"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"ghost": "model-00001-of-00001.safetensors"}}, "'ghost', and it does not"),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside the directory"),
        ({"weight_map": {"a": 3}}, "no weight_map"),
        ({}, "no weight_map"),
        ({"weight_map": {}}, "empty weight_map"),
        ([], "holds a list"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: object, reason: str) -> None:
    write_sharded(tmp_path, [{"a": np.ones(1, np.float32)}])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match=reason):
        SafetensorsCheckpoint(tmp_path)


def test_a_missing_tensor_and_one_that_is_no_weight(tmp_path: Path) -> None:
    write_single(tmp_path, {"mask": np.ones(4, np.bool_)})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="no tensor 'ghost'"):
        checkpoint.load("ghost")
    with pytest.raises(UnsupportedModel, match="stored as BOOL; only F32, F16, BF16"):
        checkpoint.load("mask")
