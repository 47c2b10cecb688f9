"""The default model's file, SmolLM2-135M-Instruct in GGUF: its hash, tensors, tokenizer and text files."""

import json
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from export.checkpoint.gguf.file import GgufCheckpoint
from export.sources.default_model import SMOLLM2, default_model_file
from export.sources.open import open_checkpoint
from runtime.artifact.known_hashes import sha256_of

pytestmark = pytest.mark.real

# Computed with llama.cpp (build 11549, its /tokenize with parse_special, no add_special) from the same file:
# text in many scripts, numbers, whitespace, code, special tokens, and random mixtures of all that.
SMOLLM_IDS = [json.loads(line) for line in Path(__file__).with_name("smollm2_ids.jsonl").read_text().splitlines()]


@cache
def smollm() -> Tokenizer:
    files = GgufCheckpoint(default_model_file()).text_files()
    return Tokenizer.from_str(files["tokenizer.json"])


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_default_model_gives_the_ids_of_llama_cpp() -> None:
    tokenizer = smollm()
    for row in SMOLLM_IDS:
        assert ids_of(tokenizer, row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["text"]


@pytest.mark.oracle
def test_default_model_gives_the_ids_of_transformers() -> None:
    """On text without numbers. transformers' conversion of this file drops the split of numbers into single
    characters, which changes what whitespace before a number becomes; llama.cpp and we keep it.
    """
    pytest.importorskip("torch", reason="the oracle needs torch")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    file = default_model_file()
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [row["text"] for row in SMOLLM_IDS]
    texts = [text for text in texts if not any(unicodedata.category(char)[0] == "N" for char in text)]
    assert len(texts) > 10
    for text in texts:
        assert ids_of(smollm(), text) == theirs.encode(text, add_special_tokens=False), text


def test_default_model_text_files() -> None:
    files = GgufCheckpoint(default_model_file()).text_files()
    assert set(files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["add_bos_token"] is False
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 2
    assert "add_generation_prompt" in files["chat_template.jinja"]
    assert smollm().decode([1, 19556, 2]) == "Hello"


def test_the_default_model_is_what_it_says() -> None:
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    assert checkpoint.source == "smollm2-135m-instruct"
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.config["eos_token_id"] == 2
    assert len(checkpoint.tensors) == 272
    assert checkpoint.load("model.embed_tokens.weight").shape == (49152, 576)


def test_the_real_model_comes_from_the_index() -> None:
    assert sha256_of(default_model_file()) == SMOLLM2.sha256
