"""The tokenizer made from a GGUF file splits and joins text as the model's own tokenizer does."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer

from export.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from export.checkpoint.gguf.tokenizer import merges_by_score, text_files
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.tiny.gguf import byte_level_metadata, sentencepiece_metadata


def ids_of(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special).ids)


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(text_files(metadata, "tiny.gguf")["tokenizer.json"])


def splits(pre: str, text: str) -> list[str]:
    """The pieces of `text` before BPE, by offsets."""
    pieces = build(byte_level_metadata(pre)).pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "I'LL don't  x1234", ["I", "'", "LL", " don", "'t", " ", " x", "1234"]),
        ("gpt-2", "a\n\n  b!?", ["a", "\n\n ", " b", "!?"]),
        ("smollm", "x1234  5", ["x", "1", "2", "3", "4", "  ", "5"]),
        ("smollm", "a ²½", ["a", " ", "²", "½"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("llama-bpe", "I'LL 1234567\n\n  x", ["I", "'LL", " ", "123", "456", "7", "\n\n", " ", " x"]),
        ("llama-bpe", "(a[0]!=b){\r\n", ["(a", "[", "0", "]!=", "b", "){\r\n"]),
        ("qwen2", "I'LL 123\n\n  x", ["I", "'LL", " ", "1", "2", "3", "\n\n", " ", " x"]),
        ("qwen2", "你好,世界", ["你好", ",世界"]),
        ("deepseek-r1-qwen", "a12", ["a", "1", "2"]),
        ("tekken", "HTTPServer's 12", ["HTTPServer", "'s", " ", "1", "2"]),
        ("tekken", "camelCase a/b", ["camel", "Case", " a", "/b"]),
    ],
)
def test_text_is_split_as_the_family_does(pre: str, text: str, expected: list[str]) -> None:
    assert splits(pre, text) == expected


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_split_loses_nothing(pre: str) -> None:
    text = "I'LL don't\r\n\r\n\t x=1234567 ²½ 你好 e\u0301 👩\u200d👧 مرحبا ١٢٣ \u00a0\u3000 <eos> ab"
    tokenizer = build(byte_level_metadata(pre, {"tokenizer.ggml.add_bos_token": False}))
    normalized = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].is_nfc else text
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False) == normalized


def test_whole_tokens_are_matched_in_text() -> None:
    tokenizer = build(byte_level_metadata("gpt-2"))
    assert ids_of(tokenizer, "<bos>ab<think><eos>") == [257, 256, 259, 258]
    assert tokenizer.decode([257, 256, 259, 258]) == "ab<think>"


@pytest.mark.parametrize(
    ("pre", "extra", "expected"),
    [
        ("gpt-2", {}, [256]),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, [257, 256]),
        ("llama-bpe", {}, [257, 256]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, [256]),
        (
            "gpt-2",
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True},
            [257, 256, 258],
        ),
    ],
)
def test_ends_are_added_as_the_file_says(pre: str, extra: dict[str, bool], expected: list[int]) -> None:
    assert ids_of(build(byte_level_metadata(pre, extra)), "ab", special=True) == expected


def join_best_first(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[str]:
    """SentencePiece's BPE by definition: join the two neighbours with the best union, leftmost first."""
    score = dict(zip(tokens, scores, strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [left + right for left, right in pairwise(symbols)]
        known = [(-score[union], place) for place, union in enumerate(unions) if union in score]
        if not known:
            break
        place = min(known)[1]
        symbols[place : place + 2] = [unions[place]]
    pieces = []
    for symbol in symbols:
        pieces += [symbol] if symbol in score else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return pieces


@pytest.mark.parametrize("text", ["banana", "a ban  an", "nab", "  ", "banané\n😀 b", "an" * 20])
def test_sentencepiece_joins_best_first(text: str) -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build(metadata)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.tokens == join_best_first(text, tokens, scores)
    assert tokenizer.decode(encoded.ids) == text


def test_sentencepiece_adds_bos_and_the_space_before_text() -> None:
    assert build(sentencepiece_metadata()).encode("ban").tokens == ["<s>", "▁ban"]
    bare = build(sentencepiece_metadata({"tokenizer.ggml.add_space_prefix": False}))
    assert bare.encode("ban").tokens == ["<s>", "ban"]
    assert bare.decode(bare.encode(" ban").ids) == " ban"


def test_merges_rank_by_score_then_by_position() -> None:
    assert merges_by_score(["a", "b", "c", "ab", "bc", "abc"], [0, 0, 0, -2, -1, -1]) == [
        ("b", "c"),
        ("a", "bc"),
        ("ab", "c"),
        ("a", "b"),
    ]


LONG_TOKEN = {
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "x" * 1025],
    "tokenizer.ggml.scores": [0.0] * 3,
    "tokenizer.ggml.token_type": [2, 3, 1],
}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (byte_level_metadata("kimi-k2"), "'kimi-k2' is not supported; supported: gpt-2, phi-2, smollm"),
        (byte_level_metadata(None), r"has no tokenizer\.ggml\.pre"),
        (
            byte_level_metadata("gpt-2", {"tokenizer.ggml.model": "rwkv"}),
            "'rwkv' is not supported; supported: gpt2, llama, t5",
        ),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.tokens": None}), r"has no tokenizer\.ggml\.tokens"),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.token_type": [1]}), "1 entries for 260 tokens"),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.merges": ["ab"]}), "merge 'ab' is not two parts"),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.merges": ["b c"]}), "merges do not fit its tokens"),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.eos_token_id": 999}), "eos_token_id is 999"),
        (sentencepiece_metadata({"tokenizer.ggml.scores": None}), r"has no tokenizer\.ggml\.scores"),
        (sentencepiece_metadata({"tokenizer.ggml.scores": [float("nan")] * 270}), "an array of finite numbers"),
        (sentencepiece_metadata(LONG_TOKEN), "has 1,025 characters, more than 1,024"),
        (
            sentencepiece_metadata({"tokenizer.ggml.add_space_prefix": 1}),
            "add_space_prefix must be true or false, got 1",
        ),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.tokens": 5}), "tokens must be an array of strings, got 5"),
        (byte_level_metadata("gpt-2", {"tokenizer.ggml.merges": [1]}), "merges must be an array of strings"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=reason):
        text_files(metadata, "tiny.gguf")


def test_named_templates_become_one_list() -> None:
    named = {"tokenizer.chat_template": "one", "tokenizer.chat_templates": ["tool_use"]}
    files = text_files(byte_level_metadata("gpt-2", named | {"tokenizer.chat_template.tool_use": "two"}), "tiny.gguf")
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "two"},
    ]
    assert "chat_template.jinja" not in files


def test_a_padding_id_that_is_no_token_is_none() -> None:
    files = text_files(byte_level_metadata("gpt-2", {"tokenizer.ggml.padding_token_id": 4294967295}), "tiny.gguf")
    assert "pad_token" not in json.loads(files["tokenizer_config.json"])


def test_unknown_splits_are_a_model_not_supported_rather_than_a_broken_file() -> None:
    with pytest.raises(UnsupportedModel):
        text_files(byte_level_metadata("kimi-k2"), "tiny.gguf")
