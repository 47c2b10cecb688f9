"""How ignored fields are reported: as the text of a header to the client, as labels of a metric to the operator.

Both are bounded, although clients may invent names: the header is ASCII of limited length, and the labels are the names
in the tables of serve/fields/foreign.py.
"""

import re
from collections.abc import Iterable

from serve.fields.foreign import CHAT, COMPLETION, IGNORED, REFUSED, REQUEST
from serve.fields.messages import REASONING_NAMES

HEADER = "X-Headrace-Ignored"
MAX_HEADER_CHARS = 1000
"""Some proxies limit all headers of a reply together to 4,096 bytes."""
MAX_NAME_CHARS = 100
UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
OTHER = "other"
AT_TOP = (REQUEST, CHAT, COMPLETION)
READ_BY_SOME = ("enable_thinking", "reasoning_effort", *(f"messages[].{name}" for name in REASONING_NAMES))
"""Supported fields that have no effect if the model's chat template does not read them."""
KNOWN = frozenset(READ_BY_SOME) | frozenset(
    row.name if place in AT_TOP else f"{place}.{row.name}"
    for kinds in (IGNORED, REFUSED)
    for place, rows in kinds.items()
    for row in rows
)


def header_text(names: Iterable[str]) -> str:
    """The names, separated by commas. An ellipsis replaces names that do not fit, a question mark unsafe characters."""
    text = ""
    for name in names:
        piece = ("" if not text else ", ") + UNSAFE.sub("?", name[:MAX_NAME_CHARS])
        if len(text) + len(piece) + len(", ...") > MAX_HEADER_CHARS:
            return text + ", ..."
        text += piece
    return text


def label(name: str) -> str:
    """The metric's label for a name: the name itself if it is in a table, else `other`."""
    return name if name in KNOWN else OTHER
