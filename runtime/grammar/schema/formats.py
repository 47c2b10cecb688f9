"""The `format`s of JSON schemas. A format that is not named here is an annotation and restricts nothing.

    the grammar's own       llguidance has an expression for it and enforces it
    by a pattern            written out here, in JavaScript's syntax, for the grammar and for the check
    only checked            `regex`: a grammar cannot express it

References: RFC 3986 and 3987 (URI, IRI), 6570 (templates), 6901 (pointers), 3339 (dates). Each pattern is one
line: it requires the right characters in the right places, and no more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from runtime.grammar.schema.pattern_parser import PatternError, parse

_PLAIN = r"A-Za-z0-9\-._~!$&'()*+,;="
_WIDE = r"\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef\u{10000}-\u{efffd}"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*:"
_HOST = r"(?://\[[0-9A-Fa-f:.]+\](?::[0-9]*)?)?"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?(?:[Zz]|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_DAY = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"
_VARIABLE = r"(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})(?:\.?(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2}))*(?:\*|:[1-9][0-9]{0,3})?"
_EXPRESSION = rf"\{{[+#./;?&=,!@|]?{_VARIABLE}(?:,{_VARIABLE})*\}}"
_HOSTNAME = r"[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"


def _reference(more: str, *, has_scheme: bool) -> str:
    """A URI, or with `more` characters an IRI; without a scheme, its first part has no colon."""
    first, then, last = (rf"(?:[{_PLAIN}{more}{chars}]|%[0-9A-Fa-f]{{2}})*" for chars in ("@", ":@/", ":@/?"))
    whole = f"{_SCHEME}{_HOST}{then}"
    path = whole if has_scheme else f"(?:{whole}|{first}(?:/{then})?)"
    return rf"^{path}(?:\?{last})?(?:#{last})?$"


def _parts(units: str) -> str:
    return "".join(f"(?:[0-9]+{unit})?" for unit in units)


GRAMMAR_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
PATTERNS = {
    "uri-reference": _reference("", has_scheme=False),
    "iri": _reference(_WIDE, has_scheme=True),
    "iri-reference": _reference(_WIDE, has_scheme=False),
    "uri-template": rf"^(?:[^\x00-\x20\"'%<>\\^`{{|}}]|%[0-9A-Fa-f]{{2}}|{_EXPRESSION})*$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$",
    "idn-email": r"^[^@\s]+@[^@\s]+$",
}
"""Formats for which the grammar has no expression of its own."""
CHECKED_PATTERNS = {
    **PATTERNS,
    "uri": _reference("", has_scheme=True),
    "time": f"^{_TIME}$",
    "date-time": f"^{_DAY}[Tt]{_TIME}$",
    "hostname": rf"^{_HOSTNAME}(?:\.{_HOSTNAME})*$",
    "duration": rf"^P(?=[0-9T])(?:[0-9]+W|{_parts('YMD')}(?:T(?=[0-9]){_parts('HMS')})?)$",
}
"""Formats that the check of the complete answer matches by pattern; needed inside keywords that no grammar enforces."""
LIBRARY_FORMATS = ("date", "ipv4", "ipv6", "uuid", "email")
FORMATS = GRAMMAR_FORMATS | PATTERNS.keys() | {"regex"}


def format_checker(matches: Callable[[str, str], bool]) -> Any:
    """The format checker for `jsonschema`. `matches` tells whether a text contains a match of a pattern."""
    from jsonschema import FormatChecker

    checker = FormatChecker(LIBRARY_FORMATS)
    for name, pattern in CHECKED_PATTERNS.items():
        checker.checkers[name] = (partial(_has, matches, pattern), ())
    checker.checkers["regex"] = (_is_pattern, ())
    return checker


def _has(matches: Callable[[str, str], bool], pattern: str, value: Any) -> bool:
    """Formats are those of strings."""
    return not isinstance(value, str) or matches(pattern, value)


def _is_pattern(value: Any) -> bool:
    try:
        return not isinstance(value, str) or bool(parse(value))
    except PatternError:
        return False
