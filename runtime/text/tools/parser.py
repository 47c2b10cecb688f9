"""Parses a stream of text into plain text and tool calls, whose arguments come as they grow.

Text that may be the beginning of a call is held back, so no part of a tag is ever shown. A call begins with its
arguments, once its name is known to be a tool's. What turns out to be no call is given out as text. Knows nothing of
tokens or HTTP.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from runtime.text.tools.formats import ToolFormat

ARGUMENT_KEYS = ("arguments", "parameters")
"""Both are accepted in every format: models mix them up."""
OTHER_KEYS = ("type", "id")
"""Keys allowed beside name and arguments. An object with any other key before its arguments is no call."""
BETWEEN_CALLS = " \t\r\n;,]"
"""Characters between bare calls, the brackets of a list included."""
WHITESPACE = " \t\r\n"
MAX_SPACE = 1_000
"""Most characters of white space that are held back because a call may follow."""


class ToolPiece(NamedTuple):
    """A piece of plain `text` (`call_idx` None), or of a call.

    The first piece of a call has its `name`, later ones only `arguments`: JSON text to concatenate.
    """

    text: str = ""
    call_idx: int | None = None
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads the JSON object of one call character by character; gives out its arguments before its end."""

    def __init__(self, names: Collection[str]) -> None:
        self.name: str | None = None
        self.is_complete = False
        self.is_broken = False
        self._names = names
        self._step: Callable[[str], None] = self._before
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._arguments: list[str] | None = None  # not yet taken; None: none have come

    @property
    def has_begun(self) -> bool:
        """Whether this is certainly a call: its name is a tool's, and its arguments have begun or it is complete."""
        is_sound = self.name is not None and not self.is_broken
        return is_sound and (self._arguments is not None or self.is_complete)

    @property
    def is_in_arguments(self) -> bool:
        """Whether the next character belongs to the arguments."""
        return self._step == self._in_value and self._key in ARGUMENT_KEYS

    def push(self, char: str) -> None:
        """Add a character, unless the call is complete or broken."""
        self._step(char)

    def take_arguments(self) -> str:
        """The arguments that have come since the last call of this. A complete call without arguments has an empty
        object."""
        if self._arguments is None:
            if not self.is_complete:
                return ""
            self._arguments = ["{}"]
        taken, self._arguments = self._arguments, []
        return "".join(taken)

    def _before(self, char: str) -> None:
        self._expect(char, {"{": self._before_key})

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._value, self._in_string, self._depth, self._step = [char], True, 0, self._in_key
        elif char == "}" and self.name is not None:
            self.is_complete = True
        else:
            self._expect(char, {})

    def _in_key(self, char: str) -> None:
        self._value.append(char)
        self._scan(char)
        if not self._in_string:
            self._key, self._step = str(self._decoded()), self._before_colon
            is_second = self._key in ARGUMENT_KEYS and self._arguments is not None
            is_known = self._key in ("name", *ARGUMENT_KEYS, *OTHER_KEYS)
            self.is_broken |= is_second or not (is_known or self.has_begun)

    def _before_colon(self, char: str) -> None:
        self._expect(char, {":": self._before_value})

    def _before_value(self, char: str) -> None:
        if char not in WHITESPACE:
            self._value, self._in_string, self._depth, self._step = [], False, 0, self._in_value
            self._in_value(char)

    def _in_value(self, char: str) -> None:
        first = self._value[0] if self._value else char
        is_bare = first not in '"{['
        if is_bare and char in ",}" + WHITESPACE:
            self._end_value()
            self._step(char)
            return
        self._value.append(char)
        self._scan(char)
        if self._key in ARGUMENT_KEYS and first == "{":
            self._arguments = self._arguments or []
            self._arguments.append(char)
        if not is_bare and not self._in_string and self._depth == 0:
            self._end_value()

    def _end_value(self) -> None:
        self._step = self._after_value
        if self._key == "name":
            name = self._decoded()
            self.name = name if isinstance(name, str) and name in self._names else None
            self.is_broken |= self.name is None
        elif self._key == "type":
            self.is_broken |= self._decoded() != "function"
        elif self._key in ARGUMENT_KEYS and self._value[:1] != ["{"]:
            # Some models write the arguments as a string that holds JSON, or null for none.
            value = self._decoded()
            self.is_broken |= not isinstance(value, str | None) or _is_no_object(value)
            if not self.is_broken:
                self._arguments = [value if isinstance(value, str) else "{}"]

    def _after_value(self, char: str) -> None:
        if char == "}":
            self.is_complete = self.name is not None
            self.is_broken |= not self.is_complete
        else:
            self._expect(char, {",": self._before_key})

    def _expect(self, char: str, steps: Mapping[str, Callable[[str], None]]) -> None:
        if char in steps:
            self._step = steps[char]
        elif char not in WHITESPACE:
            self.is_broken = True

    def _scan(self, char: str) -> None:
        """Follow strings and brackets."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _decoded(self) -> object:
        try:
            return json.loads("".join(self._value), strict=False)
        except (ValueError, RecursionError):
            self.is_broken = True
            return ""


class ToolCallParser:
    """Finds the calls of one answer. `push` its text as it comes, `finish` at the end."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self.num_calls = 0
        self.num_ended = 0
        """Calls that have ended, or broke off after they had begun."""
        self._form = form
        self._names = frozenset(names)
        self._held = ""  # not yet decided
        self._raw: list[str] = []  # of the call being read, in case it is none; behind its arguments once it has begun
        self._reader: CallReader | None = None
        self._has_begun = False
        self._step = self._in_text if form.opening else self._at_start
        self._pieces: list[ToolPiece] = []

    def push(self, text: str) -> list[ToolPiece]:
        """Add text; return the pieces that are now certain."""
        self._held += text
        while self._held and self._step():
            pass
        return self._taken()

    def finish(self) -> list[ToolPiece]:
        """The pieces that were held back, at the end of the answer. A call that has begun stays as it is."""
        rest = "" if self._has_begun else "".join(self._raw) + self._held
        if rest.strip() or not self.num_calls:  # space around calls is no text
            self._say(rest)
        self._held, self._raw = "", []
        return self._taken()

    def _taken(self) -> list[ToolPiece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(ToolPiece(text))

    # Each step takes what it can from `_held`. It returns whether to go on; False waits for more text.

    def _in_text(self) -> bool:
        """Tagged formats: text up to an opening tag."""
        before, tag, after = self._held.partition(self._form.opening)
        if tag:
            said = _without_end_space(before)
            self._say(said)
            self._begin_call(before[len(said) :] + tag, after)
            return True
        kept = _overlap(self._held, self._form.opening)
        said = _without_end_space(self._held[: len(self._held) - kept])
        self._say(said)
        self._held = self._held[len(said) :]
        return False

    def _at_start(self) -> bool:
        """Bare formats: is the message a call?"""
        text = self._held.lstrip(WHITESPACE)
        prefix = self._form.prefix
        body = "" if prefix and prefix.startswith(text) else text.removeprefix(prefix).lstrip(WHITESPACE + "[")
        if len(self._held) - len(body) > MAX_SPACE:
            self._step = self._in_plain
        elif not body:
            return False
        elif body[0] == "{":
            self._begin_call(self._held[: len(self._held) - len(body)], body)
        else:
            self._step = self._in_plain
        return True

    def _between(self) -> bool:
        """Bare formats: another call, or the end."""
        self._held = self._held.lstrip(BETWEEN_CALLS)
        if not self._held:
            return False
        if self._held[0] == "{":
            self._begin_call("", self._held)
        else:
            self._step = self._in_plain
        return True

    def _in_plain(self) -> bool:
        self._say(self._held)
        self._held = ""
        return False

    def _begin_call(self, raw: str, rest: str) -> None:
        self._raw, self._held = [raw], rest
        self._reader, self._has_begun = CallReader(self._names), False
        self._step = self._in_call

    def _in_call(self) -> bool:
        reader = self._reader
        assert reader is not None
        used = 0
        for char in self._held:
            if reader.is_complete or reader.is_broken:
                break
            is_argument = reader.is_in_arguments
            reader.push(char)
            used += 1
            self._raw.append(char)
            if reader.has_begun and not self._has_begun:
                self._pieces.append(ToolPiece(call_idx=self.num_calls, name=reader.name))
                self._has_begun = True
                self.num_calls += 1
            if self._has_begun and (is_argument or reader.is_in_arguments):
                self._raw.clear()
        self._held = self._held[used:]
        if self._has_begun and (arguments := reader.take_arguments()):
            self._pieces.append(ToolPiece(call_idx=self.num_calls - 1, arguments=arguments))
        if reader.is_broken:
            self._break_call()
            return True
        if reader.is_complete:
            self._end_call()
        return reader.is_complete

    def _end_call(self) -> None:
        self.num_ended += 1
        self._raw, self._has_begun = [], False
        self._step = self._before_closing if self._form.closing else self._between

    def _break_call(self) -> None:
        """It is no call: give out its text. A call that has begun cannot be taken back; then only the text after its
        arguments is given out."""
        self._say("".join(self._raw))
        self._raw = []
        if self._has_begun:
            self.num_ended += 1
            self._has_begun = False
            self._step = self._to_closing if self._form.closing else self._in_plain
        else:
            self._step = self._in_text if self._form.opening else self._in_plain

    def _before_closing(self) -> bool:
        text = self._held.lstrip(WHITESPACE)
        if self._form.closing.startswith(text) and text != self._form.closing:
            return False
        self._held = text.removeprefix(self._form.closing)
        self._step = self._in_text
        return True

    def _to_closing(self) -> bool:
        """After a call that broke off: give out the rest without the closing tag."""
        before, tag, after = self._held.partition(self._form.closing)
        if tag:
            self._say(before)
            self._held, self._step = after, self._in_text
            return True
        kept = _overlap(before, self._form.closing)
        self._say(before[: len(before) - kept])
        self._held = before[len(before) - kept :]
        return False


def _is_no_object(text: str | None) -> bool:
    """Whether arguments that came as text are JSON of another type than object, which no client could use."""
    try:
        return text is not None and not isinstance(json.loads(text), dict | None)
    except (ValueError, RecursionError):
        return False


def _without_end_space(text: str) -> str:
    """A text without its final white space, up to the most that may be held back."""
    return text[:-MAX_SPACE] + text[-MAX_SPACE:].rstrip(WHITESPACE)


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
