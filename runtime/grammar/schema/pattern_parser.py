r"""Reads a JavaScript regular expression into a tree. Knows nothing of schemas or of who will run it.

Lenient: outside of classes a `{` or `]` without its partner is itself, as in browsers, and the additions of Python, Go
and Java are understood: `\A`, `\Z`, `(?P<name>...)`, `(?i)`, `[[:alpha:]]`, `{,5}`.
Grammar: https://tc39.es/ecma262/#sec-patterns and its annex B.
"""

import re

from runtime.grammar.schema.pattern_tree import (
    CONTROLS,
    LINE_ENDS,
    MAX_CODE,
    POSIX,
    SHORTHANDS,
    Alternatives,
    Anchor,
    Backreference,
    CharClass,
    Group,
    Look,
    Node,
    Ranges,
    Repeat,
    complement,
)

MAX_REPEAT = 10_000_000
"""No answer has more characters than this: a greater bound is no bound."""
MAX_GROUPS = 60
"""Deepest nesting of groups: the parser is recursive."""
QUANTIFIER = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
GROUP_NAME = re.compile(r"\?P?<([^>=!][^>]*)>")
FLAGS = re.compile(r"\?([a-zA-Z]*)(?:-([a-zA-Z]+))?([:)])")
NAMED_REFERENCE = re.compile(r"\(\?P=([^)]+)\)")
NUMBER = re.compile(r"[1-9][0-9]{0,2}")
LETTER = re.compile("[A-Za-z]")
OCTAL = re.compile("[0-3]?[0-7]{1,2}")
DIGITS_OF_CODE = {"x": 2, "u": 4}
PROPERTY = re.compile(r"\{\^?[A-Za-z0-9_=: -]{1,60}\}|[A-Z]")


class PatternError(Exception):
    """A pattern that cannot be read; the message completes "the pattern ...", without quoting it."""


def parse(pattern: str) -> Alternatives:
    """The tree of a pattern. Raises PatternError."""
    parser = _Parser(pattern)
    tree = parser.alternatives()
    if parser.pos < len(pattern):
        raise PatternError(f"closes a group at {parser.pos} that is not open")
    return tree


class _Parser:
    """Reads from `pos` on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self._num_groups = 0
        self._names: dict[str, int] = {}
        self._open: set[int] = set()
        self._depth = 0
        self._dot_takes_all = False

    def _peek(self) -> str:
        return self.text[self.pos : self.pos + 1]

    def _take(self, literal: str) -> bool:
        if not self.text.startswith(literal, self.pos):
            return False
        self.pos += len(literal)
        return True

    def _match(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        found = expression.match(self.text, self.pos)
        if found is not None:
            self.pos = found.end()
        return found

    def alternatives(self) -> Alternatives:
        """Read up to a closing parenthesis or the end."""
        self._depth += 1
        if self._depth > MAX_GROUPS:
            raise PatternError(f"has more than {MAX_GROUPS} groups within groups")
        options: list[tuple[Node, ...]] = []
        items: list[Node] = []
        while (char := self._peek()) not in ("", ")"):
            if char == "|":
                self.pos += 1
                options.append(tuple(items))
                items = []
            elif (flagged := self._flags_ahead()) is not None:
                rest = self.alternatives()  # flags hold to the end of the group, over its later alternatives, too
                is_behind_anchors = all(isinstance(item, Anchor) for item in items) and len(rest.options) == 1
                if options or (items and not is_behind_anchors):
                    raise PatternError("has flags that are not at the beginning")
                items.append(Group(rest, ignores_case=True) if flagged else Group(rest))
            elif (atom := self._atom()) is not None:
                items.append(self._quantified(atom))
        self._depth -= 1
        return Alternatives((*options, tuple(items)))

    def _flags_ahead(self) -> bool | None:
        """Take flags such as `(?i)`. Returns whether they ignore case; None if there are no flags here."""
        found = FLAGS.match(self.text, self.pos + 1) if self._peek() == "(" else None
        if found is None or found[3] != ")" or not found[1]:
            return None
        self.pos = found.end()
        return self._set_flags(found)

    def _set_flags(self, found: re.Match[str]) -> bool:
        if other := set(found[1] + (found[2] or "")) - set("isu"):
            raise PatternError(f"has the flag {min(other)!r}; i, s and u are known")
        if found[2]:
            raise PatternError("switches a flag off, which is not supported")
        self._dot_takes_all |= "s" in found[1]
        return "i" in found[1]

    def _quantified(self, atom: Node) -> Node:
        while True:
            char, start = self._peek(), self.pos
            if char and char in "*+?":
                self.pos += 1
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
            elif (found := self._match(QUANTIFIER)) is not None and (found[1] or found[3]):
                least = int(found[1][:12] or 0)
                most = None if found[2] and not found[3] else int((found[3] if found[2] else found[1])[:12])
            else:
                self.pos = start
                return atom
            if least > MAX_REPEAT or (most is not None and most < least):
                raise PatternError(f"has bounds at {start} that no text can meet")
            most = None if most is not None and most > MAX_REPEAT else most
            is_possessive = self._take("+")
            if not is_possessive:
                self._take("?")
            atom = Repeat(atom, least, most, is_possessive)

    def _atom(self) -> Node | None:
        """Read one item; None for a comment, which matches nothing."""
        start = self.pos
        if self._peek() == "(":
            return self._group()
        char = self.text[start]
        self.pos += 1
        match char:
            case "[":
                return self._char_class()
            case ".":
                return CharClass(((0, MAX_CODE),)) if self._dot_takes_all else CharClass(LINE_ENDS, is_negated=True)
            case "^" | "$":
                return Anchor(char)
            case "\\":
                return self._escape()
            case "*" | "+" | "?":
                raise PatternError(f"repeats nothing at {start}")
        return CharClass(((ord(char), ord(char)),))

    def _group(self) -> Node | None:
        start = self.pos
        if (reference := self._match(NAMED_REFERENCE)) is not None:
            return self._named(reference[1])
        self.pos += 1
        if self._take("?#"):
            self.pos = (self.text + ")").index(")", self.pos) + 1
            return None
        make = self._group_kind(start)
        before = self._dot_takes_all
        number = self._num_groups if isinstance(make, dict) and make.get("is_capturing") else 0
        self._open.add(number)
        body = self.alternatives()
        self._open.discard(number)
        self._dot_takes_all = before
        if not self._take(")"):
            raise PatternError(f"opens a group at {start} that it does not close")
        return Look(make, body) if isinstance(make, str) else Group(body, **make)

    def _group_kind(self, start: int) -> str | dict[str, bool]:
        """Read what follows a parenthesis: the opening of a look-around, or the attributes of the group."""
        for opening in ("?=", "?!", "?<=", "?<!"):
            if self._take(opening):
                return opening
        if self._take("?>"):
            return {"is_atomic": True}
        if (name := self._match(GROUP_NAME)) is not None:
            self._num_groups += 1
            self._names[name[1]] = self._num_groups
            return {"is_capturing": True}
        if (flags := self._match(FLAGS)) is not None and flags[3] == ":":
            return {"ignores_case": self._set_flags(flags)}
        if self._peek() == "?":
            raise PatternError(f"has an unknown kind of group at {start}")
        self._num_groups += 1
        return {"is_capturing": True}

    def _named(self, name: str) -> Node:
        if name not in self._names:
            raise PatternError(f"refers to a group {name[:40]!r} that is not before it")
        return self._numbered(self._names[name])

    def _numbered(self, number: int) -> Node:
        """A reference to a group; empty within the group itself."""
        return Group(Alternatives(((),))) if number in self._open else Backreference(number)

    def _escape(self) -> Node:
        """Read an escape outside of a class, after its backslash."""
        char = self._peek()
        if char in ("b", "B"):
            self.pos += 1
            return Anchor(char)
        if char in ("A", "Z", "z"):
            self.pos += 1
            return Anchor("^" if char == "A" else "$")
        if char == "k" and (name := self._match(re.compile("k<([^>]+)>"))) is not None:
            return self._named(name[1])
        if (digits := NUMBER.match(self.text, self.pos)) is not None and int(digits[0]) <= self._num_groups:
            self.pos = digits.end()
            return self._numbered(int(digits[0]))
        found = self._escaped()
        return found if isinstance(found, CharClass) else CharClass(((found, found),))

    def _escaped(self) -> CharClass | int:
        """Read an escape that is valid in a class and outside: a set, or one character."""
        char = self._peek()
        if not char:
            raise PatternError("ends with a backslash")
        self.pos += 1
        if char in SHORTHANDS:
            return CharClass(SHORTHANDS[char])
        if char in "pP" and (name := self._match(PROPERTY)) is not None:
            return CharClass((), properties=(f"\\{char}{name[0] if name[0][0] == '{' else '{' + name[0] + '}'}",))
        return self._escaped_char(char)

    def _escaped_char(self, char: str) -> int:
        """The one character of an escape whose `char` has been taken."""
        code: int | None = CONTROLS.get(char)
        if char in DIGITS_OF_CODE:
            code = self._code(DIGITS_OF_CODE[char])
        elif char == "c" and (letter := self._match(LETTER)) is not None:
            code = ord(letter[0]) % 32
        elif char in "01234567":
            self.pos -= 1
            octal = self._match(OCTAL)
            assert octal is not None
            code = int(octal[0], 8)
        return ord(char) if code is None else code

    def _code(self, digits: int) -> int | None:
        r"""The character of `\xHH`, `\uHHHH`, `\u{H...}` or a pair of surrogates; None: the letter is itself."""
        found = self._match(re.compile(rf"[0-9A-Fa-f]{{{digits}}}|\{{[0-9A-Fa-f]{{1,6}}\}}"))
        if found is None:
            return None
        code = int(found[0].strip("{}"), 16)
        if 0xD800 <= code <= 0xDBFF:
            low = self._match(re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})"))
            if low is not None:
                code = 0x10000 + (code - 0xD800) * 0x400 + int(low[1], 16) - 0xDC00
        if code > MAX_CODE or 0xD800 <= code <= 0xDFFF:
            raise PatternError(f"names U+{code:04X}, which is no character")
        return code

    def _char_class(self) -> CharClass:
        start = self.pos
        is_negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        properties: list[str] = []
        while not self._take("]"):
            if not self._peek():
                raise PatternError(f"opens a class at {start - 1} that it does not close")
            item = self._class_item()
            if isinstance(item, int):
                ranges.append((item, self._range_end(item)))
            else:
                ranges += item.ranges
                properties += item.properties
        return CharClass(_in_order(ranges), is_negated, tuple(properties))

    def _class_item(self) -> CharClass | int:
        if (posix := self._match(re.compile(r"\[:(\^?)([a-z]+):\]"))) is not None and posix[2] in POSIX:
            named = POSIX[posix[2]]
            return CharClass(complement(named) if posix[1] else named)
        if posix is not None:
            raise PatternError(f"has an unknown class [:{posix[2][:20]}:]")
        char = self._peek()
        self.pos += 1
        if char != "\\":
            return ord(char)
        if self._take("b"):
            return 8
        return self._escaped()

    def _range_end(self, low: int) -> int:
        """The end of the range that begins with `low`; `low` itself if there is no range."""
        start = self.pos
        if not self._take("-") or self._peek() in ("", "]"):
            self.pos = start
            return low
        high = self._class_item()
        if not isinstance(high, int):  # [a-\d] is an a, a dash and digits
            self.pos = start
            return low
        if high < low:
            raise PatternError(f"has a range at {start - 1} that runs backwards")
        return high


def _in_order(ranges: list[tuple[int, int]]) -> Ranges:
    """The same characters in sorted ranges, with those that touch joined."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)
