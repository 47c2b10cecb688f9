"""Tokenizers made from GGUF metadata give the ids of transformers' own classes, on 1,000 strings of many scripts.

The vocabularies are trained here. What is compared is how text is normalized, split and joined.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from export.checkpoint.gguf.tokenizer import text_files
from runtime.text.tokenizer import Tokenizer as OurTokenizer

NUM_STRINGS = 1000
WORDS = [
    "The", "quick", "brown", "fox", "I'LL", "don't", "HTTPServer", "camelCase", "snake_case", "x=1234567;", "3.14",
    "na\u00efve", "d\u00e9j\u00e0", "e\u0301te\u0301", "\u0141\u00f3d\u017a", "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0661\u0662\u0663", "\u00b2\u00bd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7",
    "\u0915\u093e", "a/b", "(a[0]!=b){", "->", "\u2026", "\u3002", "$5", "50%", "#tag", "@me", "<b>",
    "\u00a0", "\u3000",
]  # fmt: skip
GAPS = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "", ""]


def strings() -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randint(1, 12))) for _ in range(NUM_STRINGS)
    ]


TEXTS = strings()


def byte_level(normalizer: Any, splits: list[Any], *, has_own_regex: bool) -> Tokenizer:
    """A trained tokenizer with a model's own tokenizer.json: its normalizer, and its steps before BPE."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=has_own_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.train_from_iterator(
        TEXTS[:300], trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return tokenizer


def split_at(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior="isolated")


NFC = normalizers.NFC()
DIGITS = pre_tokenizers.Digits(individual_digits=True)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As the models' tokenizer.json files have them.
PUBLISHED: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(None, [], has_own_regex=True),
    "smollm": lambda: byte_level(None, [DIGITS], has_own_regex=True),
    "starcoder": lambda: byte_level(None, [DIGITS], has_own_regex=True),
    "command-r": lambda: byte_level(NFC, [DIGITS], has_own_regex=True),
    "olmo": lambda: byte_level(NFC, [], has_own_regex=True),
    "llama-bpe": lambda: byte_level(None, [split_at(CL100K)], has_own_regex=False),
    "glm4": lambda: byte_level(None, [split_at(CL100K)], has_own_regex=False),
    "gpt-4o": lambda: byte_level(None, [split_at(O200K)], has_own_regex=False),
    "bloom": lambda: byte_level(None, [split_at(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+")],
                                has_own_regex=False),
}  # fmt: skip


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """As the converter writes it: tokens in the order of ids, and merges."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }


def ids_of(metadata: dict[str, Any]) -> list[list[int]]:
    built = Tokenizer.from_str(text_files(metadata, "tiny.gguf")["tokenizer.json"])
    return [built.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_ids_are_those_of_the_models_own_file(pre: str) -> None:
    own = PUBLISHED[pre]()
    expected = [own.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ids_of(metadata_of(own, pre)) == expected
    other = "qwen2" if pre != "qwen2" else "gpt-2"
    assert ids_of(metadata_of(own, other)) != expected, "a wrong split must be visible"


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ("gpt-2", "GPT2Tokenizer"),
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen35", "Qwen3_5Tokenizer"),
        ("command-r", "CohereTokenizer"),
        ("olmo", "GPTNeoXTokenizer"),
    ],
)
def test_byte_level_ids_are_those_of_transformers_classes(pre: str, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    trained = byte_level(None, [], has_own_regex=True)
    model = json.loads(trained.to_str())["model"]
    specials = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "!")
    if name == "CohereTokenizer":
        specials |= {"cls_token": "!", "sep_token": "!", "mask_token": "!"}
    own = getattr(transformers, name)(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], **specials)
    metadata = metadata_of(trained, pre)
    expected = [own._tokenizer.encode(text.replace("!", "?"), add_special_tokens=False).ids for text in TEXTS]
    built = Tokenizer.from_str(text_files(metadata, "tiny.gguf")["tokenizer.json"])
    assert [built.encode(text.replace("!", "?"), add_special_tokens=False).ids for text in TEXTS] == expected


def pieces() -> tuple[list[str], list[float]]:
    """A SentencePiece vocabulary: control tokens, bytes and trained pieces with their scores."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"])
    unigram.train_from_iterator(TEXTS[:300], trainer)
    vocab = [(token, score) for token, score in json.loads(unigram.to_str())["model"]["vocab"] if token != "<unk>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *(token for token, _ in vocab)]
    # By rank, as BPE training gives them.
    return tokens, [0.0] * 259 + [-float(rank) for rank in range(len(vocab))]


def sentencepiece(*, has_prefix: bool) -> dict[str, Any]:
    tokens, scores = pieces()
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }


@pytest.mark.parametrize(("name", "has_prefix"), [("LlamaTokenizer", True), ("GemmaTokenizer", False)])
def test_sentencepiece_ids_are_those_of_transformers_classes(name: str, has_prefix: bool) -> None:
    transformers = pytest.importorskip("transformers")
    metadata = sentencepiece(has_prefix=has_prefix)
    merges = json.loads(text_files(metadata, "tiny.gguf")["tokenizer.json"])["model"]["merges"]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    specials = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "mask_token": "<unk>",
    }
    own = getattr(transformers, name)(vocab=vocab, merges=[tuple(m) for m in merges], **specials)
    expected = [own._tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ids_of(metadata) == expected


@pytest.mark.parametrize("has_bytes", [False, True])
def test_unigram_ids_are_those_of_the_library(has_bytes: bool) -> None:
    tokens, scores = pieces()
    if not has_bytes:
        tokens, scores = [tokens[0], *tokens[259:]], [scores[0], *scores[259:]]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [6 if token.startswith("<0x") else 1 for token in tokens],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    own = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True)), unk_id=0, byte_fallback=has_bytes))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    expected = [own.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ids_of(metadata) == expected
    files = text_files(metadata, "tiny.gguf")
    served = OurTokenizer(Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"]))
    if has_bytes:
        assert served.decode(served.encode("na\u00efve \U0001f1eb")) == "na\u00efve \U0001f1eb"


def test_a_string_that_is_there_twice() -> None:
    """Gemma's own file has such: text becomes the last of its ids, and each id is decoded."""
    metadata = sentencepiece(has_prefix=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    first = tokens.index("a")
    for name, value in (("tokens", "a"), ("scores", -1e4), ("token_type", 1)):
        metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], value]
    files = text_files(metadata, "tiny.gguf")
    served = OurTokenizer(Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"]))
    last = len(tokens)
    assert served.encode("a", add_special_tokens=False) == [last]
    assert served.decode([first, last]) == "aa"
    assert served.vocab_size == last + 1
