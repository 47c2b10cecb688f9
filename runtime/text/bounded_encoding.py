"""Encodes text with bounds on time and memory: refuses a text that cannot fit before most of it is tokenized.

A tokenizer takes some 300 bytes of memory for each byte of text, and a second for each megabyte. So a text is compared
with the limit three times, the cheapest way first:

    1. its bytes, with the length of the longest token: nothing is tokenized
    2. a long text in chunks, until those read so far have too many tokens
    3. the whole text, for its exact ids: its caller counts these

All texts together take at most `MAX_BYTES_AT_ONCE` bytes at any moment. Knows nothing of models or requests.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.errors import InvalidRequest, Overloaded, PromptTooLong

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

MAX_BYTES_AT_ONCE = 2**20
"""Bytes of text in the tokenizer at once, in the whole process: some 300 MB of memory at most."""
SMALL_BYTES = 2**14
"""A text up to this length never waits: the number of threads bounds these."""
WAIT_S = 10.0
"""Longest wait of a text for others; then its request is refused with Retry-After."""
CHUNK_CHARS = 2**15
BYTES_PER_TOKEN = 6
"""Ordinary text has about four bytes a token. Only a text with more than this for each token that fits is counted in
chunks first. So ordinary prompts are tokenized once."""
CUT_TOKENS = 64
"""Most tokens by which a cut between two chunks changes the count; real tokenizers showed at most four."""
NFC_SHRINKS = 3
"""Normalization form C shrinks text at most to a third of its bytes (U+0390; searched over all of Unicode)."""


class ByteBudget:
    """Bytes that may be in use at once. A text larger than all of it waits until it is alone."""

    def __init__(self, num_bytes: int, *, wait_s: float = WAIT_S) -> None:
        self._size = self._free = num_bytes
        self._wait_s = wait_s
        self._changed = threading.Condition()

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[None]:
        """Hold so many bytes. Raises Overloaded if they do not come free in time."""
        if num_bytes <= SMALL_BYTES:
            yield
            return
        wanted = min(num_bytes, self._size)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= wanted, self._wait_s):
                raise Overloaded("too much text is being tokenized at once; try again later", retry_after=1)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


BUDGET = ByteBudget(MAX_BYTES_AT_ONCE)
"""The budget of this process."""


class BoundedEncoder:
    """Encodes with one `tokenizers.Tokenizer`. Safe to use from many threads."""

    def __init__(self, tokenizer: "HfTokenizer", *, budget: ByteBudget = BUDGET) -> None:
        self._hf = tokenizer
        self._budget = budget
        self.longest_token = _longest_token(tokenizer)
        """Most bytes of text that one token can stand for; None if there is no such bound."""

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text.

        Raises PromptTooLong if the text certainly has more than `max_tokens` tokens; a text that is only a little too
        long may be encoded all the same. InvalidRequest if it is not valid Unicode, Overloaded if too much text is
        being tokenized.
        """
        num_bytes = num_bytes_of(text)
        if max_tokens is not None:
            self._refuse_too_long(text, num_bytes, max_tokens)
        with self._budget.take(num_bytes):
            return self._ids(text, add_special_tokens)

    def _refuse_too_long(self, text: str, num_bytes: int, max_tokens: int) -> None:
        longest = self.longest_token
        if longest is not None and num_bytes > max_tokens * longest:
            raise PromptTooLong(
                f"the text has {num_bytes:,} bytes, and {max_tokens:,} tokens hold at most {max_tokens * longest:,}; "
                "shorten it",
                param="prompt",
            )
        if len(text) <= CHUNK_CHARS or num_bytes <= max_tokens * BYTES_PER_TOKEN:
            return
        num_tokens = 0
        for start in range(0, len(text), CHUNK_CHARS):
            chunk = text[start : start + CHUNK_CHARS]
            # Text that can vanish is space beside a token that absorbs it, perhaps across the cut.
            counted = chunk if longest is not None else chunk.strip()
            with self._budget.take(num_bytes_of(counted)):
                num_tokens += max(0, len(self._ids(counted, False)) - CUT_TOKENS)
            if num_tokens > max_tokens:
                raise PromptTooLong(
                    f"the first {start + len(chunk):,} of the text's {len(text):,} characters are already more than "
                    f"the {max_tokens:,} tokens that fit; shorten it",
                    param="prompt",
                )

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one: only this call releases the GIL. The fast variant keeps no offsets.
        ids: list[int] = self._hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids


def num_bytes_of(text: str) -> int:
    """Length of a text in UTF-8. InvalidRequest for a lone surrogate, which has none."""
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}; remove it", param="prompt"
        ) from error


def _longest_token(tokenizer: "HfTokenizer") -> int | None:
    """Most bytes of text that a token can stand for; None where text can vanish, so that no length is too long."""
    parts: dict[str, Any] = msgspec.json.decode(tokenizer.to_str())
    added = parts.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):  # they absorb any amount of space
        return None
    model = parts["model"]
    has_unknown = model.get("unk_token") is not None or model.get("unk_id") is not None
    if has_unknown and not model.get("byte_fallback"):
        return None  # one token may stand for a run of characters that are not in the vocabulary
    shrinks = _shrinking(parts.get("normalizer"))
    if shrinks is None:
        return None
    # In a byte-level vocabulary a character is a byte; in another, U+2581 counts as three where it may be one space.
    is_byte_level = "ByteLevel" in str(parts.get("decoder"))
    own = tokenizer.get_vocab(with_added_tokens=False)
    lengths = [len(token) if is_byte_level else len(token.encode()) for token in own]
    return shrinks * max([*lengths, *(len(token["content"].encode()) for token in added)])


def _shrinking(normalizer: Mapping[str, Any] | None) -> int | None:
    """Most bytes of text that a normalizer can turn into one byte; None if no bound is known."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "NFC":
        return NFC_SHRINKS
    if normalizer["type"] == "Replace":
        old = normalizer["pattern"].get("String")
        return 1 if old is not None and len(old.encode()) <= len(normalizer["content"].encode()) else None
    if normalizer["type"] == "Sequence":
        product = 1
        for part in normalizer["normalizers"]:
            factor = _shrinking(part)
            if factor is None:
                return None
            product *= factor
        return product
    return None
