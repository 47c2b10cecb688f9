"""Tokenizing with bounds: what cannot fit is refused before it is tokenized, and only so much is tokenized at once."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE, WordLevel

from runtime.errors import InvalidRequest, Overloaded, PromptTooLong
from runtime.text.bounded_encoding import CHUNK_CHARS, SMALL_BYTES, BoundedEncoder, ByteBudget
from tests.support.byte_tokenizer import byte_fallback_hf, byte_level_hf


class Counted:
    """A tokenizer that notes how much text it was given."""

    def __init__(self, hf: HfTokenizer) -> None:
        self._hf = hf
        self.num_chars = 0

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        self.num_chars += sum(map(len, texts))
        return self._hf.encode_batch_fast(list(texts), **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf, name)


def counted(hf: HfTokenizer) -> tuple[BoundedEncoder, Counted]:
    tokenizer = Counted(hf)
    return BoundedEncoder(tokenizer), tokenizer  # type: ignore[arg-type]  # it has all that is used


def test_a_text_longer_than_its_longest_tokens_is_refused_before_it_is_tokenized() -> None:
    encoder, tokenizer = counted(byte_level_hf())
    assert encoder.longest_token == len("<|begin|>")
    with pytest.raises(PromptTooLong, match="4,000,000 bytes, and 100 tokens hold at most 900"):
        encoder.encode("1" * 4_000_000, add_special_tokens=False, max_tokens=100)
    assert tokenizer.num_chars == 0


def test_a_text_of_short_tokens_is_refused_after_the_chunks_that_fit() -> None:
    encoder, tokenizer = counted(byte_level_hf())
    with pytest.raises(PromptTooLong, match="are already more than the 50,000 tokens that fit"):
        encoder.encode("1" * 440_000, add_special_tokens=False, max_tokens=50_000)
    assert tokenizer.num_chars == 2 * CHUNK_CHARS


def test_a_text_that_may_fit_is_tokenized_once_and_whole() -> None:
    encoder, tokenizer = counted(byte_level_hf())
    text = "1" * 100_000
    assert len(encoder.encode(text, add_special_tokens=False, max_tokens=100_000)) == len(text) == tokenizer.num_chars
    # A little too long: the caller has the exact count to tell.
    assert len(encoder.encode("1" * 101, add_special_tokens=False, max_tokens=100)) == 101


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab \u00e9\u4e2d\U0001f468<|end|>"), max_size=300), max_tokens=st.integers(1, 1500))
@pytest.mark.parametrize("hf", [byte_level_hf(), byte_fallback_hf()], ids=["byte-level", "byte-fallback"])
def test_no_text_that_fits_is_ever_refused(hf: HfTokenizer, text: str, max_tokens: int) -> None:
    encoder = BoundedEncoder(hf)
    whole = encoder.encode(text, add_special_tokens=False)
    if len(whole) <= max_tokens:
        assert encoder.encode(text, add_special_tokens=False, max_tokens=max_tokens) == whole


def tokenizer_with(normalizer: Any = None, added: AddedToken | None = None) -> HfTokenizer:
    hf = byte_level_hf()
    if normalizer is not None:
        hf.normalizer = normalizer
    if added is not None:
        hf.add_special_tokens([added])
    return hf


@pytest.mark.parametrize(
    ("hf", "longest"),
    [
        (tokenizer_with(normalizers.NFC()), 27),
        (tokenizer_with(normalizers.Sequence([normalizers.Prepend("x"), normalizers.Replace(" ", "\u2581")])), 9),
        (tokenizer_with(normalizers.Sequence([])), 9),
        # Where text can vanish, no number of bytes is too many.
        (tokenizer_with(normalizers.Strip()), None),
        (tokenizer_with(normalizers.Replace("  ", " ")), None),
        (tokenizer_with(normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])), None),
        (tokenizer_with(added=AddedToken("<|pad|>", special=True, rstrip=True)), None),
        (HfTokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")), None),
        (HfTokenizer(BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)), None),
    ],
)
def test_the_longest_token_is_known_unless_text_can_vanish(hf: HfTokenizer, longest: int | None) -> None:
    assert BoundedEncoder(hf).longest_token == longest


def test_text_that_vanishes_is_not_refused_for_its_bytes() -> None:
    encoder = BoundedEncoder(tokenizer_with(added=AddedToken("<|pad|>", special=True, rstrip=True)))
    assert len(encoder.encode("<|pad|>" + " " * 200_000, add_special_tokens=False, max_tokens=10)) == 1


def test_text_that_is_not_unicode_is_refused_whatever_its_length() -> None:
    encoder = BoundedEncoder(byte_level_hf())
    for text in ("ab\ud800", "a" * 100_000 + "\ud800"):
        with pytest.raises(InvalidRequest, match="lone surrogate"):
            encoder.encode(text, add_special_tokens=False, max_tokens=10)


def test_a_text_waits_for_those_before_it_and_is_refused_if_they_take_too_long() -> None:
    budget = ByteBudget(100_000, wait_s=0.01)
    encoder = BoundedEncoder(byte_level_hf(), budget=budget)
    with budget.take(90_000):
        with pytest.raises(Overloaded, match="too much text") as refused:
            encoder.encode("a" * (SMALL_BYTES + 1), add_special_tokens=False)
        assert refused.value.retry_after == 1
        # A short text never waits.
        assert len(encoder.encode("a" * SMALL_BYTES, add_special_tokens=False)) == SMALL_BYTES
    # One that is larger than all of it waits until it is alone.
    assert len(encoder.encode("a" * 200_000, add_special_tokens=False)) == 200_000


def test_released_bytes_wake_a_waiting_thread() -> None:
    budget = ByteBudget(50_000, wait_s=60.0)
    done = threading.Event()

    def wait() -> None:
        with budget.take(50_000):
            done.set()

    with pytest.raises(ZeroDivisionError), budget.take(20_000):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not done.is_set()
        raise ZeroDivisionError
    thread.join()
    assert done.is_set()
