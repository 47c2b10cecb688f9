"""Finds the special tokens (`bos_token`, `eos_token` and others) that a checkpoint's files name, as text."""

from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidCheckpoint
from runtime.text.tokenizer import SPECIAL_TOKEN_NAMES

FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""The files that name them. transformers 5 writes only the first; older tools write both."""

EXTRA = ("additional_special_tokens", "extra_special_tokens")


def special_token(values: Mapping[str, Any], name: str, file: str) -> str | None:
    """The text of one special token, written as a string or as an object with `content`; None if there is none."""
    value = values.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise InvalidCheckpoint(
            f"{file}: {name} must be a token's text, or an object with its content, got {value!r:.120}"
        )
    return text or None


def special_tokens(files: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """All special tokens in the parsed files. InvalidCheckpoint for an entry of another shape."""
    found: set[str] = set()
    for file in FILES:
        values = files.get(file, {})
        found.update(text for name in SPECIAL_TOKEN_NAMES if (text := special_token(values, name, file)))
        for name in EXTRA:
            found.update(_extra(values.get(name), name, file))
    return frozenset(found)


def _extra(value: object, name: str, file: str) -> set[str]:
    """A list of tokens, or an object of named ones, as newer tools write them."""
    entries = list(value.values()) if isinstance(value, dict) else value
    if entries is None:
        return set()
    if not isinstance(entries, list):
        raise InvalidCheckpoint(f"{file}: {name} must be a list of tokens, got {value!r:.120}")
    return {text for entry in entries if (text := special_token({name: entry}, name, file))}
