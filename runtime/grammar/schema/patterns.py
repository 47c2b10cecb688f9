r"""Translates JavaScript patterns of JSON schemas for the two engines that run them here.

The grammar's engine (Rust's syntax, no look-around, no back-references) enforces the pattern while the answer is
written. The `regex` package checks the rest when the answer is complete. JavaScript differs
from both: `\/` and `\-`, `\uXXXX`, `[^]`, what `\d`, `\s` and `.` stand for, where `$` matches. So a pattern is read
into a tree (`runtime/grammar/schema/pattern_parser.py`) and written anew for each, with every class spelled out.

The grammar's pattern leaves out look-around, word boundaries and anchors in the middle. Then it matches more than the
original, never less.
"""

from collections.abc import Sequence
from typing import NamedTuple

from runtime.grammar.schema.pattern_parser import parse
from runtime.grammar.schema.pattern_tree import (
    Alternatives,
    Anchor,
    Backreference,
    CharClass,
    Group,
    Look,
    Node,
    Repeat,
)

ANYTHING = r"(?:[\x00-\U0010FFFF]*)"


class Pattern(NamedTuple):
    """One pattern, written twice.

    grammar: in Rust's syntax; matches all that the original matches
    is_exact: whether it matches nothing else
    whole: in the syntax of the `regex` package, exact
    """

    grammar: str
    is_exact: bool
    whole: str


def translate_pattern(pattern: str) -> Pattern:
    """Translate a pattern. Raises PatternError, which says what cannot be read and where."""
    tree = parse(pattern)
    writer = _GrammarWriter()
    grammar = writer.write(tree, is_first=True, is_last=True)
    return Pattern(grammar, writer.is_exact, _write_whole(tree))


class _GrammarWriter:
    """Writes a tree for the grammar's engine; `is_exact` tells whether nothing was left out."""

    def __init__(self) -> None:
        self.is_exact = True

    def write(self, node: Node, *, is_first: bool, is_last: bool) -> str:
        """`is_first` and `is_last`: no item that matches characters comes before, or after, within the pattern. Only
        there do anchors work in this engine."""
        text = ""
        match node:
            case CharClass():
                text = _class_text(node)
            case Anchor():
                is_possible = is_first if node.kind == "^" else is_last and node.kind == "$"
                text = node.kind if is_possible else ""
                self.is_exact &= is_possible
            case Look():
                self.is_exact = False
            case Backreference():
                text = ANYTHING
                self.is_exact = False
            case Repeat():
                is_once = node.most == 1 and not _has_anchor(node.item)
                item = self.write(node.item, is_first=is_first and is_once, is_last=is_last and is_once)
                text = _repeated(f"(?:{item})" if isinstance(node.item, Repeat) else item, node) if item else ""
                self.is_exact &= not node.is_possessive
            case Group():
                body = self.write(node.body, is_first=is_first, is_last=is_last)
                text = f"(?i:{body})" if node.ignores_case else f"(?:{body})"
                self.is_exact &= not node.is_atomic
            case Alternatives():
                text = "|".join(self._sequence(items, is_first=is_first, is_last=is_last) for items in node.options)
        return text

    def _sequence(self, items: Sequence[Node], *, is_first: bool, is_last: bool) -> str:
        takes = [index for index, item in enumerate(items) if _takes_characters(item)]
        first, last = (takes[0], takes[-1]) if takes else (len(items), -1)
        return "".join(
            self.write(item, is_first=is_first and index <= first, is_last=is_last and index >= last)
            for index, item in enumerate(items)
        )


def _takes_characters(node: Node) -> bool:
    return not isinstance(node, Anchor | Look)


def _has_anchor(node: Node) -> bool:
    match node:
        case Anchor():
            return True
        case Group():
            return _has_anchor(node.body)
        case Repeat():
            return _has_anchor(node.item)
        case Alternatives():
            return any(_has_anchor(item) for items in node.options for item in items)
    return False


def _write_whole(node: Node) -> str:
    match node:
        case CharClass():
            text = _class_text(node)
        case Anchor():
            text = {"^": r"\A", "$": r"\Z", "b": _BOUNDARY, "B": _NO_BOUNDARY}[node.kind]
        case Look():
            text = f"({node.opening}{_write_whole(node.body)})"
        case Backreference():
            # In JavaScript a group that has not matched is empty.
            text = rf"(?({node.number})\g<{node.number}>|)"
        case Repeat():
            text = _repeated(f"(?:{_write_whole(node.item)})", node) + ("+" if node.is_possessive else "")
        case Group():
            body = _write_whole(node.body)
            body = f"(?i:{body})" if node.ignores_case else body
            text = f"(?>{body})" if node.is_atomic else f"({body})" if node.is_capturing else f"(?:{body})"
        case Alternatives():
            text = "|".join("".join(map(_write_whole, items)) for items in node.options)
    return text


_WORD = "[0-9A-Za-z_]"
_BOUNDARY = rf"(?:(?<={_WORD})(?!{_WORD})|(?<!{_WORD})(?={_WORD}))"
_NO_BOUNDARY = rf"(?:(?<={_WORD})(?={_WORD})|(?<!{_WORD})(?!{_WORD}))"


def _repeated(item: str, node: Repeat) -> str:
    bounds = (node.least, node.most)
    short = {(0, None): "*", (1, None): "+", (0, 1): "?", (1, 1): ""}
    if bounds in short:
        return item + short[bounds]
    if node.most is None:
        return f"{item}{{{node.least},}}"
    return f"{item}{{{node.least}}}" if node.least == node.most else f"{item}{{{node.least},{node.most}}}"


def _class_text(node: CharClass) -> str:
    ranges = node.ranges
    if not node.is_negated and not node.properties:
        if not ranges:
            return r"[^\x00-\U0010FFFF]"
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            return _char_text(ranges[0][0])
    spans = ((_char_text(low), _char_text(high)) for low, high in ranges)
    inside = "".join(low if low == high else f"{low}-{high}" for low, high in spans)
    inside += "".join(node.properties)
    if not inside:
        return r"[\x00-\U0010FFFF]"
    return f"[{'^' if node.is_negated else ''}{inside}]"


def _char_text(code: int) -> str:
    """One character, written so that it means itself to both engines, in a class and outside."""
    char = chr(code)
    if char.isascii():
        if char.isalnum() or char in " _":
            return char
        return f"\\{char}" if char.isprintable() and char not in "<>/\"'" else f"\\x{code:02X}"
    return char if char.isprintable() else f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"
