"""The interface to llguidance: constraints in Lark's notation, the vocabulary, and limits.

Used by the server and by the process for trials, which imports nothing else: it must stay light.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from runtime.text.tokenizer import Tokenizer

JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""JSON allows any amount between tokens, and a small model that begins to indent may never stop."""
UNFORCED = '%llguidance {"no_forcing": true}\n'
"""Put before a grammar: do not search for forced text. The search runs to the end of that text, which takes 40 ms a
token in a constant of 90,000 characters, and 40 us without the search."""


class Vocabulary:
    """A tokenizer's vocabulary in the form that llguidance reads; the attribute names are llguidance's. Padding has no
    bytes and is never allowed."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_ids = eos_ids
        self.eos_token_id = eos_ids[0]
        self._tokenizer: Tokenizer | None = None
        self._view: LLTokenizer | None = None

    @classmethod
    def of(cls, tokenizer: "Tokenizer", *, vocab_size: int, eos_ids: frozenset[int]) -> "Vocabulary":
        """The vocabulary of a model, whose `vocab_size` may be padded beyond the tokenizer's."""
        known = min(tokenizer.vocab_size, vocab_size)
        # What ends the text is never text, even where its token is an ordinary one.
        special_ids = [i for i in range(known) if tokenizer.is_special(i) or i in eos_ids]
        specials = frozenset(special_ids)
        tokens = [tokenizer.token_text(i).encode() if i in specials else tokenizer.token_bytes(i) for i in range(known)]
        vocabulary = cls([*tokens, *[b""] * (vocab_size - known)], special_ids, sorted(eos_ids))
        vocabulary._tokenizer = tokenizer
        return vocabulary

    def packed(self) -> bytes:
        """For the other process, which has no tokenizer."""
        tokens = [token.decode("latin-1") for token in self.tokens]
        return json.dumps({"tokens": tokens, "special_ids": self.special_token_ids, "eos_ids": self.eos_ids}).encode()

    @classmethod
    def unpacked(cls, data: bytes) -> "Vocabulary":
        """Read what `packed` gave. Divides forced text into the longest tokens, which need not be the tokenizer's."""
        found = json.loads(data)
        tokens = [token.encode("latin-1") for token in found["tokens"]]
        return cls(tokens, found["special_ids"], found["eos_ids"])

    def __call__(self, text: str) -> list[int]:
        if self._tokenizer is not None:
            return self._tokenizer.encode(text, add_special_tokens=False)
        assert self._view is not None
        return self._view.greedy_tokenize(text)

    def view(self) -> "LLTokenizer":
        """llguidance's own form of it. Takes 0.2 to 0.4 s for 49,152 tokens and 2 s for 150,000, and no other Python
        thread runs meanwhile."""
        from llguidance import LLTokenizer

        wrapper: Any = self
        view = LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=list(self.eos_ids), slices=None)
        if self._tokenizer is None:  # only then: the two hold each other for good
            self._view = view
        return view


def to_lark(kind: str, source: str) -> str:
    """A checked constraint of a `ConstraintKind` in Lark's notation. May raise any exception for unreadable GBNF."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match kind:
        case "JSON schema":
            return f"start: %json {json.dumps(with_options(json.loads(source)))}"
        case "regular expression":
            grammar = json.loads(LLMatcher.grammar_from_regex(source))
            return str(grammar["grammars"][0]["lark_grammar"])
        case "list of choices":
            # One terminal, not one for each: the lexer then walks all of them at once.
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
            return "start: CHOICE\nCHOICE: " + " | ".join(choices)
    return any_to_lark(source) if "::=" in source else source


def with_options(schema: Any) -> Any:
    """A schema with our options for llguidance."""
    if schema is True:
        schema = {}
    return {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}, **schema} if isinstance(schema, dict) else schema


def new_matcher(view: "LLTokenizer", lark: str) -> "LLMatcher":
    """A matcher at the beginning of a grammar. It holds the error of a faulty grammar."""
    from llguidance import LLMatcher

    return LLMatcher(view, LLMatcher.grammar_from_lark(lark), log_level=0, limits=_limits())


def _limits() -> "LLParserLimits":
    """Limits below llguidance's defaults, which allow steps of more than 100 ms and hundreds of megabytes."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def problem_of(matcher: "LLMatcher") -> str:
    """The problem of a matcher that has failed, in words for a refusal."""
    message = brief(matcher.get_error())
    if message.startswith("NoExtension"):
        message = "no text satisfies it"
    return f"cannot be used: {message.rpartition('failed to compile JSON schema: ')[2]}"


def brief(message: str) -> str:
    """A message of llguidance without quotations, state and backtrace: one line of at most 400 characters."""
    lines = message.strip().splitlines() or [""]
    reasons = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return " ".join([lines[0][:200], *reasons])[:400]
