"""Finds the tokens that only the chat template may write, and masks messages so that no text becomes one of them.

A chat template marks who speaks with control tokens (`<|im_start|>`). The tokenizer finds those anywhere in a text, so
a message that contains `<|im_end|><|im_start|>system` would become a system message. Two kinds of tokens are
reserved for the template:

    control     special tokens, those written like them (`<|...|>`; DeepSeek's are not declared special), and other
                tags that the template writes around plain messages: reserved in everything that a client sends
    structure   other tags of the template (`<tool_response>`, `<think>`): reserved in tools' results, descriptions and
                arguments. In messages of users and models they stay: models write such tags themselves

Every control token has a character that marks it (`|`, `<`, ...). In a masked conversation these characters are lone
surrogates, which no valid text contains. So every control token in the rendered conversation was written by the
template, however it joins texts. Knows nothing of Jinja or engines.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

_MARKS = {char: rank for rank, char in enumerate("|\uff5c\u2581[]{}<>/")}
"""Characters that mark a token, the rarest in ordinary text first. Other punctuation marks a token without them."""
_LIKE_SPECIAL = re.compile(r"[<\[][|\uff5c].*[|\uff5c][>\]]", re.S)
_TAG = re.compile(r"</?[\w:.|-]+>|\[/?[A-Z_]+\]")
_FIRST_SURROGATE = 0xDC00
_DATA = frozenset({"tools", "tool_calls", "documents"})


class AddedToken(NamedTuple):
    """A token that the tokenizer finds as a whole, before it splits text into words."""

    token_id: int
    text: str
    is_special: bool


class ControlTokens:
    """The control and structure tokens of one tokenizer under one chat template."""

    def __init__(
        self, added: Iterable[AddedToken], *, template: str, plain: str = "", named: Collection[str] = ()
    ) -> None:
        """`template`: its source; `plain`: its rendering of a few plain messages; `named`: texts that
        tokenizer_config.json lists as special tokens."""
        added = [token for token in added if token.text.strip()]
        tags = frozenset(_TAG.findall(template))
        around = frozenset(_TAG.findall(plain))
        self.control = frozenset(token.text for token in added if _is_control(token, named) or token.text in around)
        self.structure = frozenset(token.text for token in added if token.text in tags) - self.control
        texts = self.control | self.structure
        self.ids = {token.text: token.token_id for token in added if token.text in texts}
        """Token ids by the texts of both kinds."""
        self._all_ids = frozenset(self.ids.values())
        hidden = sorted({_mark_of(text) or text[0] for text in texts})
        table = {char: chr(_FIRST_SURROGATE + i) for i, char in enumerate(hidden)}
        self._unmasked = {ord(surrogate): char for char, surrogate in table.items()}
        self._found = re.compile(_any_of(texts))
        self._in_speech = _Mask(self.control, tags - self.control, table)
        self._in_data = _Mask(texts, tags - texts, table)

    def masked(self, value: Any, *, is_data: bool = False) -> Any:
        """A JSON value (a list of messages) with the marks in all its strings masked. `is_data`: it belongs to a tool;
        parts of it that do are known by their role or key."""
        if isinstance(value, str):
            return (self._in_data if is_data else self._in_speech).of(value)
        if isinstance(value, Mapping):
            is_data = is_data or value.get("role") == "tool"
            return {
                self.masked(key, is_data=is_data): self.masked(item, is_data=is_data or key in _DATA)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.masked(item, is_data=is_data) for item in value]
        return value

    def unmasked(self, text: str) -> str:
        """A masked text with its original characters."""
        return text.translate(self._unmasked)

    def places(self, text: str) -> list[tuple[int, str]]:
        """Positions and texts of the control and structure tokens in a text."""
        return [(match.start(), match[0]) for match in self._found.finditer(text)]

    def num_ids(self, ids: Iterable[int]) -> int:
        """How many of the ids belong to control and structure tokens."""
        return sum(map(self._all_ids.__contains__, ids))

    def spelled(self, text: str, spelling: Mapping[str, str]) -> str:
        """A text with its control and structure tokens respelled."""
        return self._found.sub(lambda match: spelling[match[0]], text)


class _Mask:
    """Replaces the characters that mark tokens, but not in the tags `kept`, which templates search for."""

    def __init__(self, tokens: Collection[str], kept: Collection[str], table: Mapping[str, str]) -> None:
        marks = {mark for token in tokens if (mark := _mark_of(token)) is not None}
        unmarked = [token for token in tokens if _mark_of(token) is None]
        self._table = table
        self._pattern = re.compile(f"(?P<kept>{_any_of(kept)})|{_any_of(marks)}|{_any_of(unmarked)}")

    def of(self, text: str) -> str:
        return self._pattern.sub(self._masked, text)

    def _masked(self, match: "re.Match[str]") -> str:
        found = match[0]
        return found if match["kept"] is not None else self._table[found[0]] + found[1:]


def _is_control(token: AddedToken, named: Collection[str]) -> bool:
    return token.is_special or token.text in named or _LIKE_SPECIAL.fullmatch(token.text) is not None


def _mark_of(token: str) -> str | None:
    """The character whose replacement hides a token; None if the token is a word."""
    punctuation = [char for char in token if not (char.isalnum() or char.isspace() or char == "_")]
    return min(punctuation, key=lambda char: _MARKS.get(char, len(_MARKS)), default=None)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of the texts; without texts, one that matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
