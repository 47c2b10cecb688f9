"""A tokenizer whose control tokens have secret spellings, which no client can guess.

Everything else is the same, ids included. So the library encodes a text as before, with the same spaces and prefixes
around control tokens, and `<|im_end|>` is ordinary text.
"""

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.errors import InvalidArtifact
from runtime.text.bounded_encoding import BoundedEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

_FIRST_PRIVATE, _NUM_PRIVATE = 0xF0000, 0xFFFE
"""A plane of private-use characters."""
_SECRET_LEN = 8
"""Characters that begin every spelling: 128 bits, chosen when the tokenizer is made."""


class SecretSpelling:
    """`spelling` gives the new text of each token; `encode` reads that text. Safe to use from many threads."""

    def __init__(self, tokenizer: "HfTokenizer", ids: Mapping[str, int]) -> None:
        """`ids`: the tokens to respell, by their text. Raises InvalidArtifact if the library gives them other ids."""
        secret = "".join(chr(_FIRST_PRIVATE + secrets.randbelow(_NUM_PRIVATE)) for _ in range(_SECRET_LEN))
        self.spelling = {text: secret + chr(_FIRST_PRIVATE + i) for i, text in enumerate(sorted(ids))}
        parts = _respelled(msgspec.json.decode(tokenizer.to_str()), self.spelling)
        respelled = type(tokenizer).from_str(msgspec.json.encode(parts).decode())
        wrong = [text for text, token_id in ids.items() if respelled.token_to_id(self.spelling[text]) != token_id]
        if wrong:
            raise InvalidArtifact(f"tokenizer.json: the added token {wrong[0]!r} has an id that is not its own")
        self._encoder = BoundedEncoder(respelled)

    def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text in which control tokens have the new spelling. Raises as `BoundedEncoder.encode` does."""
        return self._encoder.encode(text, add_special_tokens=False, max_tokens=max_tokens)


def _respelled(parts: dict[str, Any], spelling: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json with new spellings of some tokens, wherever they occur."""
    for token in parts["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"])
    model = parts["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {spelling.get(text, text): token_id for text, token_id in vocabulary.items()}
    else:  # Unigram: a list of texts and scores
        model["vocab"] = [[spelling.get(text, text), score] for text, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # merges that make a control token of pieces: text must not become one this way
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not spelling.keys() & {*pair, "".join(pair)}]
    parts["post_processor"] = None  # it only adds tokens around a text, as the template does itself
    return parts
