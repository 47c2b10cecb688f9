"""The environment in which chat templates run: Jinja as transformers sets it up, with limits on work and memory.

A template is a program that comes with a model. Jinja's sandbox keeps it from Python's internals and from changing
values. Its work is counted (runtime/text/chat/limits.py), and operations that make much out of little are checked
before they run: repetitions, powers, widths, replacements, joins, splits, indents, nested lists turned to text. So any
rendering ends within seconds and a few hundred megabytes. Filters and methods that no chat template needs, and that
would need checks of their own, are removed. Knows nothing of messages or tokens.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from runtime.text.chat.limits import (
    CHARS_PER_STEP,
    ITEMS_PER_STEP,
    MAX_BITS,
    MAX_POWER,
    MAX_REPEAT,
    MAX_WIDTH,
    NODE_CHARS,
    Instrument,
    Meter,
    TemplateLimitError,
    weight,
)

STRING_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii"  # noqa: SIM905
    " isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip"
    " partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines"
    " startswith strip swapcase title upper zfill".split()
)
PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
SPLITTING = frozenset({"split", "rsplit", "splitlines"})
NOT_THERE = frozenset({"urlize", "wordwrap", "pprint", "xmlattr", "filesizeformat", "random", "wordcount", "striptags"})
CHEAP = frozenset({"attr", "count", "d", "default", "first", "last", "length", "reverse", "safe"})
"""Filters whose time does not depend on the values in a list."""
SORTING = frozenset({"sort", "dictsort", "unique", "min", "max", "groupby"})
STRUCTURAL = SORTING | {"batch", "items", "list", "map", "reject", "rejectattr", "select", "selectattr", "slice", "sum"}
"""Filters that turn no list or object into text."""
COMPARING = frozenset({"eq", "equalto", "==", "ne", "!=", "gt", "ge", "lt", "le", ">", ">=", "<", "<=", "in"})


class TemplateRefusalError(TemplateError):
    """The template called `raise_exception`."""


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks what to train on; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of a chat template. Each thread renders one template at a time, inside `metered`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self.written,
        )
        self._local = threading.local()
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.filters = {
            name: self._guarded(name, function) for name, function in self.filters.items() if name not in NOT_THERE
        }
        self.filters["tojson"] = self._guarded("tojson", _tojson)
        for name in COMPARING:
            self.tests[name] = self._comparing(self.tests[name])  # type: ignore[arg-type]  # jinja2: "function"

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Count the work done inside."""
        self._local.meter = Meter()
        try:
            yield
        finally:
            self._local.meter = None

    def charge(self, *, steps: int = 1, chars: int = 0) -> None:
        """Count work. Raises TemplateLimitError beyond a limit. Outside of `metered` it counts a single operation:
        Jinja computes constants when it compiles."""
        meter: Meter | None = getattr(self._local, "meter", None)
        (meter or Meter()).charge(steps=steps, chars=chars)

    # Called by the instrumented template.

    def tick(self, num_chars: int) -> bool:
        """Count a round of a loop, which writes so many literal characters of the template."""
        self.charge(chars=num_chars)
        return True

    def written(self, value: Any) -> Any:
        """Count a value that is written."""
        self.charge(chars=weight(value))
        return value

    def concatenated(self, *values: Any) -> str:
        """`a ~ b`."""
        self.charge(chars=sum(map(weight, values)))
        return "".join(map(str, values))

    def weighed(self, value: Any) -> Any:
        """Count one side of a comparison, or a value that is searched."""
        if isinstance(value, str | list | tuple | dict):
            self.charge(steps=1 + weight(value) // CHARS_PER_STEP)
        return value

    def sliced(self, value: Any) -> Any:
        """Count a value that is sliced."""
        if isinstance(value, str | list | tuple):
            self.charge(chars=len(value) * (1 if isinstance(value, str) else NODE_CHARS))
        return value

    # Hooks of Jinja.

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = Instrument().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            self.charge(chars=len(left) + weight(right))
        elif operator == "**" and max(abs(left), abs(right)) > MAX_POWER:
            raise TemplateLimitError(f"{left} ** {right} is too large")
        elif operator == "*":
            self._check_product(left, right)
        elif isinstance(left, str) and isinstance(right, str):
            self.charge(chars=len(left) + len(right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            if len(left) + len(right) > MAX_REPEAT:
                raise TemplateLimitError(f"a list of {len(left) + len(right):,} items is too long")
            self.charge(chars=NODE_CHARS * (len(left) + len(right)))
        else:
            self.charge()
        return super().call_binop(context, operator, left, right)

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
            raise TemplateLimitError("a product is too large")
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                if len(value) * count > MAX_REPEAT:
                    raise TemplateLimitError(f"a repetition of {len(value)} * {count} is too long")
                self.charge(chars=max(0, len(value) * count) * (1 if isinstance(value, str) else NODE_CHARS))
        self.charge()

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in Jinja
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # from Instrument; no template can name the environment
            return __obj(*args)
        __self.charge()
        if isinstance(owner, str):
            __self._check_method(owner, __obj.__name__, args, kwargs)
            if __obj.__name__ == "join" and args:
                args = (__self._joinable(owner, args[0]),)
        elif isinstance(owner, int | float | bytes):
            raise SecurityError(f"the method {__obj.__name__} of a {type(owner).__name__} is not there")
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            __self.charge(steps=0, chars=len(result))
        return result

    def _check_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check and count a method of a string before it runs."""
        if name not in STRING_METHODS:
            raise SecurityError(f"the method {name} of a string is not there")
        self.charge(steps=len(text) // CHARS_PER_STEP)
        if name in PADDING:
            width = _largest([*args, *kwargs.values()])
            _check_width(width)
            self.charge(chars=width * (text.count("\t") if name == "expandtabs" else 1))
        elif name == "replace" and len(args) > 1:
            self._check_replacement(text, args[0], args[1])
        elif name in SPLITTING:
            separator = kwargs.get("sep", args[0] if args else None)
            num_parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
            if num_parts > MAX_REPEAT:
                raise TemplateLimitError(f"a text of {len(text):,} characters has too many parts")
            self.charge(steps=num_parts // ITEMS_PER_STEP)

    def _check_replacement(self, text: str, old: Any, new: Any) -> None:
        old, new = str(old), str(new)
        self.charge(chars=max(0, text.count(old) * (len(new) - len(old))))

    def _joinable(self, separator: str, values: Any) -> list[Any]:
        items = list(values)
        self.charge(chars=len(separator) * len(items) + weight(items))
        return items

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        form: str = value.__self__
        is_map = value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            self.charge(chars=len(form))
            return _BoundedFormatter(self).vformat(form, () if is_map else args, args[0] if is_map else kwargs)

        return formatted

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose work is checked and counted before it runs."""
        num_before = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment, given by Jinja

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            before, (value, *options) = args[:num_before], args[num_before:]
            value = self._before_filter(name, value, [*options, *kwargs.values()])
            result = function(*before, value, *options, **kwargs)
            if isinstance(result, str):
                self.charge(chars=len(result))
            return result

        return guarded

    def _before_filter(self, name: str, value: Any, options: list[Any]) -> Any:
        """Check and count the arguments of a filter; returns the value to pass to it."""
        largest = _largest(options)
        if largest > (MAX_BITS if name == "round" else MAX_REPEAT):
            raise TemplateLimitError(f"{largest:,} is too large for the filter {name}")
        if name in CHEAP:
            self.charge()
            return value
        if isinstance(value, list | tuple | dict | range):
            self.charge(steps=len(value) // ITEMS_PER_STEP)
        if name == "join":
            return self._joinable(str(options[0]) if options else "", value)
        if name == "sum" and any(isinstance(option, list | tuple) for option in options):
            raise TemplateLimitError("a sum of lists is not there")
        if name in STRUCTURAL:
            self.charge(chars=len(value) * NODE_CHARS if isinstance(value, str) else 0)
            return self.weighed(value) if name in SORTING else value
        value_weight = weight(value)
        self.charge(chars=value_weight)
        if name in ("center", "indent", "tojson"):
            _check_width(largest)
            num_lines = value.count("\n") + 1 if isinstance(value, str) else value_weight // NODE_CHARS
            self.charge(chars=(largest + weight(options)) * (1 if name == "center" else num_lines))
        elif name == "format":
            _check_widths(str(value))
            self.charge(chars=weight(options))
        elif name == "replace" and len(options) > 1:
            self._check_replacement(str(value), options[0], options[1])
        return value

    def _comparing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def compared(*values: Any) -> Any:
            return function(*map(self.weighed, values))

        return compared


class _BoundedFormatter(SandboxedFormatter):
    """`str.format` with bounded widths."""

    _env: TemplateEnvironment

    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_width(_largest_number(format_spec))
        self._env.charge(chars=weight(value) + MAX_WIDTH)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._env.charge(chars=weight(value))
        return super().convert_field(value, conversion)


def _largest(values: list[Any]) -> int:
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _largest_number(form: str) -> int:
    """The largest number written in a format; above MAX_WIDTH if it has more digits than that."""
    digits = "".join(char if char.isdecimal() else " " for char in form).split()
    return max((int(number) if len(number) <= len(str(MAX_WIDTH)) else MAX_WIDTH + 1 for number in digits), default=0)


def _check_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise TemplateLimitError(f"a width of more than {MAX_WIDTH:,} is too large")


def _check_widths(form: str) -> None:
    """The widths of a `%` format; one that comes with the values is refused."""
    _check_width(_largest_number(form))
    if "*" in form:
        raise TemplateLimitError(f"a format with * is not there: {form[:40]!r}")


def _raise_exception(message: str) -> None:
    raise TemplateRefusalError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
