"""Incremental decoding with tokenizers of every kind that is served: 10,000 random sequences each."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from runtime.grammar.notation import Vocabulary
from runtime.text.tokenizer import Tokenizer
from tests.support.byte_tokenizer import CONFIG, SPECIALS, byte_level_hf

NUM_SEQUENCES = 10_000
LITERAL = "il\u00d6veyou"  # each of its letters also stands for a byte in GPT-2's alphabet
STRANGE = "\u4f60\u597d \u00e9\t"
TEXTS = [
    "the quick brown fox, the lazy dog and the other one",
    "na\u00efve d\u00e9j\u00e0 vu \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\uff0c\u4e16\u754c",
    "  two  spaces\n\n\ttabs 12345",
    "\U0001f468\u200d\U0001f469 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece_bpe(*, has_prefix: bool) -> HfTokenizer:
    """As Llama 2's and Gemma's: byte fallback, spaces as U+2581."""
    words = sorted({*"".join(TEXTS).replace(" ", "\u2581"), "\u2581the", "\u2581\u2581", "ing", "\u2581a"})
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *words])}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if has_prefix else replace
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return tokenizer


def unigram(*, has_bytes: bool) -> HfTokenizer:
    """As T5's and XLM-R's, or with byte fallback."""
    words = sorted({*"".join(TEXTS).replace(" ", "\u2581"), "\u2581the", "\u2581\u2581", "ing", "\u2581a"})
    tokens = ["<unk>", *(BYTES if has_bytes else []), *words]
    vocab = [(token, -float(i % 7)) for i, token in enumerate(tokens)]
    tokenizer = HfTokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=has_bytes))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaces = decoders.Metaspace(prepend_scheme="always")
    tokenizer.decoder = (
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        if has_bytes
        else spaces
    )
    return tokenizer


KINDS = {
    "byte-level BPE": byte_level(),
    "SentencePiece BPE": sentencepiece_bpe(has_prefix=True),
    "SentencePiece BPE without a prefix": sentencepiece_bpe(has_prefix=False),
    "Unigram": unigram(has_bytes=False),
    "Unigram with bytes": unigram(has_bytes=True),
}


def with_added_tokens(tokenizer: HfTokenizer) -> HfTokenizer:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", STRANGE, "[INST]")])
    return tokenizer


def sequences(tokenizer: HfTokenizer, num: int) -> Iterator[list[int]]:
    """Of any tokens, of encoded texts cut anywhere, and both mixed."""
    rng = np.random.default_rng(0)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    for idx in range(num):
        ids = rng.integers(0, tokenizer.get_vocab_size(), rng.integers(0, 24)).tolist()
        if idx % 3:
            text = encoded[rng.integers(len(encoded))]
            start, stop = sorted(rng.integers(0, len(text) + 1, 2))
            ids = text[start:stop] + (ids if idx % 3 == 2 else [])
        yield ids


def id_of(tokenizer: HfTokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def expected_text(tokenizer: HfTokenizer, ids: Sequence[int]) -> str:
    """The library's, except that it gives up a whole run of byte tokens if one is bad, and a stream only what is bad.

    Such a run is replaced by a token of its own first, and by its own text afterwards.
    """
    parts: list[int] = []
    texts, stand_in = [], id_of(tokenizer, STRANGE)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    tokens = [(i, tokenizer.id_to_token(i) or "") for i in ids if i not in special]
    for is_byte, run in groupby(tokens, lambda pair: pair[1] in BYTES):
        group = list(run)
        raw = bytes(int(token[3:5], 16) for _, token in group) if is_byte else b""
        text = raw.decode(errors="replace")
        if is_byte and "\ufffd" in text:
            parts.append(stand_in)
            texts.append(text)
            continue
        for i, _ in group:
            parts.append(i)
            texts += [STRANGE] if i == stand_in else []
    if "Strip" in str(tokenizer.decoder) and parts[:1] == [stand_in]:  # it saw the stand-in, not the text
        texts[0] = texts[0].removeprefix(" ")
    pieces = tokenizer.decode(parts, skip_special_tokens=True).split(STRANGE)
    assert len(pieces) == len(texts) + 1
    return "".join(piece + text for piece, text in zip(pieces, [*texts, ""], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_what_the_library_decodes(kind: str) -> None:
    hf = with_added_tokens(KINDS[kind])
    tokenizer = Tokenizer(hf, CONFIG)
    for ids in sequences(hf, NUM_SEQUENCES):
        detokenizer = tokenizer.detokenizer()
        pieces = [*map(detokenizer.push, ids), detokenizer.finish()]
        assert "".join(pieces) == expected_text(hf, ids) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_their_own_text(kind: str) -> None:
    hf = HfTokenizer.from_str(with_added_tokens(KINDS[kind]).to_str())
    hf.add_tokens([AddedToken(text, normalized=False) for text in (LITERAL, "a\u0120b")])
    tokenizer = Tokenizer(hf, CONFIG)
    for text in (LITERAL, "a\u0120b", STRANGE, f"the {LITERAL} one", f"\u0432{LITERAL}\u0432"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert any(hf.id_to_token(i) in (LITERAL, "a\u0120b", STRANGE) for i in ids)
        shown = tokenizer.decode(ids)
        assert shown.replace(" ", "") == text.replace(" ", ""), kind
        if kind == "byte-level BPE":
            assert shown == text
    vocabulary = Vocabulary.of(tokenizer, vocab_size=hf.get_vocab_size() + 8, eos_ids=frozenset({0}))
    assert vocabulary.tokens[id_of(hf, LITERAL)] == LITERAL.encode()
    assert id_of(hf, LITERAL) in vocabulary.view().greedy_tokenize(f"the {LITERAL} one")


def test_a_token_that_merges_lead_to_stands_for_its_bytes() -> None:
    """Some files list ordinary tokens as added ones, too: their characters are still those of bytes."""
    hf = byte_level_hf()
    first, second = "\u00c3", "\u0138"  # the bytes of U+00D6
    vocab = {**hf.get_vocab(with_added_tokens=False), first + second: 300}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[(first, second)]))
    tokenizer.pre_tokenizer, tokenizer.decoder = hf.pre_tokenizer, hf.decoder
    tokenizer.add_tokens([first + second])
    wrapped = Tokenizer(tokenizer, {})
    assert wrapped.encode("\u00d6") == [300]
    assert wrapped.decode([300]) == "\u00d6"
    assert wrapped.vocab_size == 301
