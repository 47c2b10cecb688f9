"""The tree of a regular expression, and the characters of JavaScript's shorthands.

Knows nothing of how a pattern is read or written: `runtime/grammar/schema/pattern_parser.py` and
`runtime/grammar/schema/patterns.py` do that.
"""

from dataclasses import dataclass

MAX_CODE = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CharClass:
    """One character out of these. `properties` are Unicode's, written like `\\p{L}`."""

    ranges: Ranges
    is_negated: bool = False
    properties: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place between characters. kind: `^`, `$`, `b` (a word's boundary) or `B`."""

    kind: str


@dataclass(frozen=True, slots=True)
class Repeat:
    """An item `least` to `most` times; None: no limit. Laziness is not kept: it changes no match of a whole text."""

    item: "Node"
    least: int
    most: int | None
    is_possessive: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """Look-around. opening: `?=`, `?!`, `?<=` or `?<!`."""

    opening: str
    body: "Alternatives"


@dataclass(frozen=True, slots=True)
class Backreference:
    """The text that a group matched, again."""

    number: int


@dataclass(frozen=True, slots=True)
class Group:
    """Parentheses."""

    body: "Alternatives"
    is_capturing: bool = False
    is_atomic: bool = False
    ignores_case: bool = False


@dataclass(frozen=True, slots=True)
class Alternatives:
    """One of several sequences of nodes."""

    options: tuple[tuple["Node", ...], ...]


Node = CharClass | Anchor | Repeat | Look | Backreference | Group | Alternatives

DIGIT: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Ranges = (
    (0x09, 0x0D),
    (0x20, 0x20),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "a": 0x07, "e": 0x1B}
POSIX: dict[str, Ranges] = {
    "alpha": ((0x41, 0x5A), (0x61, 0x7A)),
    "digit": DIGIT,
    "alnum": ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)),
    "upper": ((0x41, 0x5A),),
    "lower": ((0x61, 0x7A),),
    "space": ((0x09, 0x0D), (0x20, 0x20)),
    "blank": ((0x09, 0x09), (0x20, 0x20)),
    "punct": ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)),
    "xdigit": ((0x30, 0x39), (0x41, 0x46), (0x61, 0x66)),
    "word": WORD,
    "print": ((0x20, 0x7E),),
    "graph": ((0x21, 0x7E),),
    "cntrl": ((0x00, 0x1F), (0x7F, 0x7F)),
}


def complement(ranges: Ranges) -> Ranges:
    """All characters outside the ranges, which must be in order."""
    found, start = [], 0
    for low, high in ranges:
        if low > start:
            found.append((start, low - 1))
        start = high + 1
    return (*found, (start, MAX_CODE)) if start <= MAX_CODE else tuple(found)


SHORTHANDS: dict[str, Ranges] = {"d": DIGIT, "w": WORD, "s": SPACE}
SHORTHANDS |= {letter.upper(): complement(ranges) for letter, ranges in SHORTHANDS.items()}
