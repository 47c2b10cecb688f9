"""No file of a checkpoint ends in a traceback: whatever stands in it, it is read, or refused by one line."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.checkpoint.config_fields import READ_FIELDS
from export.checkpoint.gguf.config import _KNOWN_KEYS, _NEUTRAL_VALUES, model_config
from export.checkpoint.gguf.tokenizer import text_files
from export.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from export.checkpoint.quantized.config import find_layers
from export.checkpoint.quantized.gptq_settings import _READ
from export.checkpoint.safetensors_dir import SafetensorsCheckpoint
from export.model.checks.model_reading import read_model
from export.model.families.architectures import parse_config
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint
from tests.support.byte_tokenizer import CONFIG, byte_level_hf
from tests.support.tiny.checkpoint import LLAMA3, VARIANTS, YARN, config_of, write_checkpoint
from tests.support.tiny.gguf import TinyGguf, byte_level_metadata, sentencepiece_metadata
from tests.support.tiny.recorded.record import HERE

ROPE_FIELDS = sorted({*YARN, *LLAMA3, "type", "rope_theta", "beta_fast", "mscale", "truncate", "attention_factor"})

scalars = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        2**31,
        10**400,
        0.0,
        1.0,
        -0.5,
        1e-300,
        1e300,
        math.nan,
        math.inf,
        "",
        "x",
        "1",
        "\ud800",
    ]
)
junk = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(variant=st.sampled_from(sorted(VARIANTS)), name=st.sampled_from(sorted(READ_FIELDS)), value=junk)
@quick
def test_any_value_of_any_config_field(variant: str, name: str, value: object) -> None:
    assert_read_or_refused(lambda: parse_config(config_of(variant, **{name: value})))


@given(field=st.sampled_from(["rope_scaling", "rope_parameters"]), name=st.sampled_from(ROPE_FIELDS), value=junk,
       base=st.sampled_from([YARN, LLAMA3, {"type": "linear", "factor": 2.0}, {}]))  # fmt: skip
@quick
def test_any_value_of_any_rotary_setting(field: str, base: dict[str, Any], name: str, value: object) -> None:
    def read() -> None:
        rope = parse_config(config_of("llama", **{field: {**base, name: value}})).rotaries[0].rope
        assert rope is not None and rope.kind in ("default", "linear", "llama3", "yarn", "longrope")

    assert_read_or_refused(read)


RECORDED = ["auto-round/mixed", "auto-round/awq", "compressed-tensors/w8a8-static", "bitsandbytes/nf4", "hqq/4-bits",
            "modelopt/fp8"]  # fmt: skip
SETTINGS = sorted(
    {*_READ, "quant_method", "mystery", "config_groups", "kv_cache_scheme", "sparsity_config", "transform_config",
     "quantization_status", "weight_block_size", "quant_algo", "quantization", "load_in_8bit", "quant_config"}
)  # fmt: skip


@given(case=st.sampled_from(RECORDED), name=st.sampled_from(SETTINGS), value=junk)
@quick
def test_any_value_of_any_quantization_setting(case: str, name: str, value: object) -> None:
    def read() -> None:
        plain = SafetensorsCheckpoint(HERE / case)
        layers = find_layers(plain, {**plain.config["quantization_config"], name: value})
        QuantizedCheckpoint(plain, layers).load("model.layers.0.mlp.down_proj.weight")

    assert_read_or_refused(read)


@given(case=st.sampled_from(RECORDED), data=st.data())
@quick
def test_any_tensor_of_a_quantized_layer_may_be_missing(case: str, data: st.DataObject) -> None:
    def read() -> None:
        plain = SafetensorsCheckpoint(HERE / case)
        name = data.draw(st.sampled_from(sorted(name for name in plain.tensors if ".mlp.down_proj." in name)))
        del plain._places[name]
        plain._tensors = MappingProxyType({key: place.info for key, place in plain._places.items()})
        layers = find_layers(plain, plain.config["quantization_config"])
        QuantizedCheckpoint(plain, layers).load("model.layers.0.mlp.down_proj.weight")

    assert_read_or_refused(read)


def assert_read_or_refused(read: Any) -> None:
    try:
        read()
    except InvalidCheckpoint as error:
        assert "\n" not in str(error)
        assert 10 < len(str(error)) < 1000, "a message is for people"


TEXTS: dict[str, dict[str, Any]] = {
    "generation_config.json": {"eos_token_id": [2], "bos_token_id": 1},
    "tokenizer_config.json": {
        **CONFIG,
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {"256": {"content": "<|begin|>", "special": True}},
        "additional_special_tokens": ["<|end|>"],
    },
    "special_tokens_map.json": {"eos_token": "<|end|>", "additional_special_tokens": []},
    "added_tokens.json": {"<|end|>": 257},
    "tokenizer.json": json.loads(byte_level_hf().to_str()),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("fuzz"), config_of("llama", num_hidden_layers=1))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    write_texts(path)
    return path


def write_texts(path: Path) -> None:
    for name, value in TEXTS.items():
        (path / name).write_text(json.dumps(value))


@given(place=st.sampled_from([(name, key) for name, values in TEXTS.items() for key in values]), value=junk)
@quick
def test_any_value_in_any_text_file(directory: Path, place: tuple[str, str], value: object) -> None:
    write_texts(directory)
    name, key = place
    (directory / name).write_text(json.dumps({**TEXTS[name], key: value}))
    assert_read_or_refused(lambda: read_model(open_checkpoint(directory)))
    write_texts(directory)


JSON_FILES = (*TEXTS, "config.json", "model.safetensors.index.json")
FILES = (*JSON_FILES, "model.safetensors", "chat_template.jinja")
REFUSED: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "UTF-16": "{}".encode("utf-16"),
    "not UTF-8": b'{"\xff": 1}',
}
NOT_JSON: dict[str, bytes] = {
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "string": b'"x"',
    "half": b'{"a": ',
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.fixture
def spoilt(directory: Path) -> Iterator[Path]:
    """The directory, put back as it was afterwards."""
    before = {file: file.read_bytes() for file in directory.iterdir()}
    yield directory
    for file in directory.iterdir():
        file.write_bytes(before[file]) if file in before else file.unlink()


@pytest.mark.parametrize(
    ("file", "kind"),
    [(file, kind) for file in FILES for kind in (*REFUSED, *NOT_JSON) if file in JSON_FILES or kind in REFUSED],
)
def test_a_file_of_another_kind_is_refused_by_its_name(spoilt: Path, file: str, kind: str) -> None:
    (spoilt / file).write_bytes({**REFUSED, **NOT_JSON}[kind])
    with pytest.raises(InvalidCheckpoint) as caught:
        read_model(open_checkpoint(spoilt))
    # A template's name is what the model calls it.
    assert Path(file).name in str(caught.value) or file.endswith(".jinja")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [*TEXTS, "config.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_no_error(spoilt: Path, file: str) -> None:
    expected = read_model(open_checkpoint(spoilt))
    (spoilt / file).write_bytes(b"\xef\xbb\xbf" + (spoilt / file).read_bytes())
    checkpoint = open_checkpoint(spoilt)
    assert read_model(checkpoint) == expected
    assert not any(text.startswith("\ufeff") for text in checkpoint.text_files().values())


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@quick
def test_any_byte_of_a_safetensors_header(directory: Path, position: int, byte: int) -> None:
    file = directory / "model.safetensors"
    before = file.read_bytes()
    header_len = 8 + int.from_bytes(before[:8], "little")
    changed = bytearray(before)
    changed[position % header_len] = byte
    file.write_bytes(changed)
    assert_read_or_refused(lambda: read_model(open_checkpoint(directory)))
    file.write_bytes(before)


METADATA = TinyGguf().metadata() | {"general.architecture": "llama"}
BASES = (METADATA, METADATA | byte_level_metadata("llama-bpe"), METADATA | sentencepiece_metadata())
SHAPES = {"token_embd.weight": (6, 64), "blk.0.attn_q.weight": (64, 64)}
TOKENIZER_KEYS = (
    "model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token", "add_space_prefix",
    "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "padding_token_id",
)  # fmt: skip
KEYS = (
    *("general.architecture", "general.type", "split.count", "tokenizer.chat_template", "tokenizer.chat_templates"),
    *(f"llama.{key}" for key in (*_KNOWN_KEYS, *_NEUTRAL_VALUES)),
    *(f"tokenizer.ggml.{key}" for key in TOKENIZER_KEYS),
)
gguf_values = scalars.filter(lambda value: value is not None) | st.sampled_from(
    [
        np.array([], np.uint8), np.array([1, 2], np.int32), np.array([1, 1]), np.array([math.nan], np.float32),
        np.array([True]), [], ["a"], ["", "\u0120 b", "<s> $A:0"], ["a b", "b a"], "yarn", "linear", "llama", "gpt2",
    ]
)  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(KEYS), gguf_values, min_size=1, max_size=2), base=st.sampled_from(BASES))
@settings(quick, max_examples=300)
def test_any_type_under_any_gguf_key(base: dict[str, Any], changes: dict[str, Any]) -> None:
    metadata = {**base, **changes}
    assert_read_or_refused(lambda: parse_config(model_config(metadata, SHAPES, {}, "tiny.gguf")))
    assert_read_or_refused(lambda: text_files(metadata, "tiny.gguf"))


@given(position=st.integers(0, 100_000), byte=st.integers(0, 255))
@quick
def test_any_byte_of_a_gguf_head(tmp_path: Path, position: int, byte: int) -> None:
    file = tmp_path / "tiny.gguf"
    if not file.is_file():
        TinyGguf().write(file)
    before = file.read_bytes()
    changed = bytearray(before)
    changed[position % 2500] = byte
    file.write_bytes(changed)
    assert_read_or_refused(lambda: read_model(open_checkpoint(file)))
    file.write_bytes(before)
