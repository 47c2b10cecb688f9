"""The text files of a checkpoint fit its model: end-of-text tokens, vocabulary, and what a server can load."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from export.model.checks.model_reading import read_model
from export.sources.open import open_checkpoint
from runtime.errors import InvalidCheckpoint
from tests.support.byte_tokenizer import byte_level_hf
from tests.support.tiny.checkpoint import config_of, write_checkpoint

WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}
PLAIN = {"bos_token": "<|begin|>"}


def directory(path: Path, *, drop: str = "", config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A tiny model; `files` are JSON values by name without its ending. <|begin|> is 256, <|end|> 257."""
    raw = {name: value for name, value in config_of("llama", **(config or {})).items() if name != drop}
    write_checkpoint(path, raw if raw.get("vocab_size") else config_of("llama"))
    (path / "tokenizer.json").write_text(byte_level_hf().to_str())
    for name, value in ({"tokenizer_config": PLAIN} | files).items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def ends(path: Path) -> tuple[int, ...]:
    return read_model(open_checkpoint(path)).eos_ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (2,)),
        ({"generation_config": {"eos_token_id": [7, 5]}}, (2, 5, 7)),
        ({"generation_config": {"eos_token_id": None}}, (2,)),
        ({"tokenizer_config": {"eos_token": "<|end|>"}}, (2, 257)),
        ({"tokenizer_config": {"eos_token": {"content": "<|end|>", "special": True}}}, (2, 257)),
        ({"special_tokens_map": {"eos_token": {"content": "<|end|>"}}}, (2, 257)),
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "special_tokens_map": {"eos_token": "a"}}, (2, 64, 257)),
        ({"tokenizer_config": {"eos_token": "<|nowhere|>"}}, (2,)),
        ({"tokenizer_config": {"eos_token": None}}, (2,)),
    ],
)  # fmt: skip
def test_end_of_text_tokens_are_the_union_of_all_files(
    files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert ends(directory(tmp_path, **files)) == expected


def test_the_default_of_the_family_ends_a_text_only_where_nothing_else_does(tmp_path: Path) -> None:
    """Llama's is 2, which in other vocabularies is an ordinary character."""
    assert ends(directory(tmp_path / "none", drop="eos_token_id")) == (2,)
    assert ends(directory(tmp_path / "other", drop="eos_token_id", tokenizer_config={"eos_token": "<|end|>"})) == (257,)
    assert ends(directory(tmp_path / "both", generation_config={"eos_token_id": 9})) == (2, 9)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"generation_config": {"eos_token_id": 320}}, "generation_config.json: eos_token_id 320 is outside"),
        ({"generation_config": {"eos_token_id": "2"}}, "generation_config.json: eos_token_id must be a token id"),
        ({"tokenizer_config": {"eos_token": 5}}, "tokenizer_config.json: eos_token must be"),
        ({"special_tokens_map": {"eos_token": ["</s>"]}}, "special_tokens_map.json: eos_token must be"),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, "tokenizer_config.json spells half a character"),
        ({"tokenizer_config": {"chat_template": "\udfff"}}, "tokenizer_config.json spells half a character"),
        ({"config": {"model_type": "\ud800"}}, "config.json spells half a character"),
        ({"tokenizer_config": {"additional_special_tokens": 5}}, "additional_special_tokens must be a list"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template must be a template"),
        ({"tokenizer_config": {"chat_template": ["a"]}}, "chat_template must be a template"),
        ({"tokenizer_config": {"chat_template": " "}}, "'default' is empty"),
        ({"tokenizer_config": {"chat_template": "{% if %}"}}, "does not compile"),
        ({"tokenizer_config": {"chat_template": {"default": "x", "tool_use": "{{"}}}, "tool_use.* does not compile"),
        ({"tokenizer": {"model": {"type": "BPE", "vocab": 5}}}, "tokenizer.json cannot be loaded"),
        ({"tokenizer": {**json.loads(byte_level_hf().to_str()), "decoder": WORD_PIECE}}, "the decoder 'WordPiece'"),
        ({"config": {"vocab_size": 248}}, "tokens up to id 255, and the model's vocabulary ends at 247"),
        ({"added_tokens": {"<|end|>": 9}}, "added_tokens.json gives '<|end|>' the id 9, and tokenizer.json 257"),
        ({"added_tokens": {"a": "x"}}, "added_tokens.json: the id of 'a' must be a token id"),
        ({"added_tokens": {"<|new|>": 300}}, "its next free id is 258"),
        ({"tokenizer_config": {"added_tokens_decoder": []}, "added_tokens": {"<|new|>": -1}}, "token id, got -1"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "added_tokens_decoder must give"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": "a"}}}, "added_tokens_decoder must give"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "<|end|>"}}}}, "id 5, and tokenizer.json 257"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(files: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        read_model(open_checkpoint(directory(tmp_path, **files)))
    assert re.search(reason.replace("|", r"\|"), str(caught.value)), str(caught.value)


def test_tokens_that_tokenizer_json_lacks_are_put_into_it(tmp_path: Path) -> None:
    path = directory(
        tmp_path,
        added_tokens={"<|im_start|>": 258, "<tool>": 260, "<|begin|>": 256},
        tokenizer_config={**PLAIN, "added_tokens_decoder": {"259": {"content": "<|im_end|>", "special": True}}},
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"]},
    )
    text = open_checkpoint(path).text_files()["tokenizer.json"]
    tokenizer = Tokenizer.from_str(text)
    assert tokenizer.encode("<|im_start|><|im_end|><tool>").ids == [258, 259, 260]
    assert [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special] == [
        "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"
    ]  # fmt: skip


def test_a_tokenizer_that_lacks_nothing_stays_as_it_is(tmp_path: Path) -> None:
    path = directory(tmp_path, added_tokens={"<|end|>": 257})
    assert open_checkpoint(path).text_files()["tokenizer.json"] == (path / "tokenizer.json").read_text()


def test_an_added_token_behind_the_last_row_is_let_be(tmp_path: Path) -> None:
    """Many fine-tunes have such a [PAD]: no text needs it."""
    path = directory(tmp_path, config={"vocab_size": 256, "bos_token_id": 1})
    assert ends(path) == (2,)


def test_a_tokenizer_of_another_kind_is_not_left_behind_in_silence(tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / "tokenizer.json").unlink()
    assert "tokenizer.json" not in open_checkpoint(path).text_files()
    (path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.model, and no tokenizer\.json.*save_pretrained"):
        read_model(open_checkpoint(path))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    path = directory(tmp_path)
    os.mkfifo(path / "generation_config.json")
    with pytest.raises(InvalidCheckpoint, match="is not a plain file"):
        read_model(open_checkpoint(path))


def test_a_file_without_end_is_not_read_whole(tmp_path: Path) -> None:
    path = directory(tmp_path)
    with (path / "generation_config.json").open("wb") as handle:
        handle.truncate(10 << 30)  # sparse
    with pytest.raises(InvalidCheckpoint, match="has 10,737,418,240 bytes, more than the 134,217,728"):
        read_model(open_checkpoint(path))
