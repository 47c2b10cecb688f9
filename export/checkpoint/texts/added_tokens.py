"""Adds the tokens of a fine-tune to a tokenizer.json that was not saved again with them.

Tools that train with the slow tokenizer write them only to added_tokens.json or tokenizer_config.json. Without them
`<|im_start|>` would be cut into pieces that the model was not trained on.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from export.checkpoint.texts.tokenizer_loading import load_tokenizer
from runtime.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SAVE_AGAIN = "save the tokenizer again (AutoTokenizer.from_pretrained, then save_pretrained)"


class NamedToken(NamedTuple):
    """A token that a file names, with the id that the file gives it."""

    text: str
    token_id: int
    is_special: bool
    file: str


def named_tokens(files: Mapping[str, Mapping[str, Any]], special: frozenset[str]) -> list[NamedToken]:
    """The tokens in added_tokens.json and in `added_tokens_decoder` of tokenizer_config.json, by id.

    `files` are the parsed JSON objects by name, `special` the tokens that they call special. InvalidCheckpoint for an
    entry of another shape.
    """
    found = [
        NamedToken(text, _token_id(token_id, ADDED_TOKENS, text), text in special, ADDED_TOKENS)
        for text, token_id in files.get(ADDED_TOKENS, {}).items()
    ]
    decoder = files.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InvalidCheckpoint(f"{TOKENIZER_CONFIG}: added_tokens_decoder must be an object, got {decoder!r:.80}")
    for key, entry in decoder.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not key.isascii() or not key.isdigit():
            raise InvalidCheckpoint(
                f"{TOKENIZER_CONFIG}: added_tokens_decoder must give each token id an object with its content, got "
                f"{key!r:.40}: {entry!r:.80}"
            )
        token_id = _token_id(int(key[:20]), TOKENIZER_CONFIG, text)
        is_special = text in special or entry.get("special") is True
        found.append(NamedToken(text, token_id, is_special, TOKENIZER_CONFIG))
    return sorted(found, key=lambda token: token.token_id)


def with_named_tokens(tokenizer: str, named: Sequence[NamedToken]) -> str:
    """tokenizer.json with the named tokens that it lacks; the same text if it lacks none.

    InvalidCheckpoint if a file gives a token another id than tokenizer.json does, or one that it could not get there.
    """
    if not named:
        return tokenizer
    library = load_tokenizer(tokenizer)
    missing = {}
    for token in named:
        token_id = library.token_to_id(token.text)
        if token_id is None:
            missing[token.text] = token
        elif token_id != token.token_id:
            raise InvalidCheckpoint(
                f"{token.file} gives {token.text!r} the id {token.token_id}, and {TOKENIZER} {token_id}: they are of "
                f"different models; {SAVE_AGAIN}"
            )
    if not missing:
        return tokenizer
    for token in missing.values():
        _add(library, token)
    return str(library.to_str())


def _add(library: "Tokenizer", token: NamedToken) -> None:
    from tokenizers import AddedToken

    library.add_tokens([AddedToken(token.text, special=token.is_special, normalized=False)])
    given = library.token_to_id(token.text)
    if given != token.token_id:
        raise InvalidCheckpoint(
            f"{token.file} gives {token.text!r} the id {token.token_id}; {TOKENIZER} lacks it, and its next free id is "
            f"{given}; {SAVE_AGAIN}"
        )


def _token_id(value: object, file: str, text: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise InvalidCheckpoint(f"{file}: the id of {text!r:.80} must be a token id, got {value!r:.80}")
    return value
