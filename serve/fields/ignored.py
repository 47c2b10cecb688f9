"""How a client and an operator are told which fields were taken without effect: a header's text, a metric's labels.

Names that a client invents reach neither unbounded: the header is ASCII of a limited length, the labels are those of
the tables in serve/fields/classes.py.
"""

import re
from collections.abc import Iterable

from serve.fields.classes import CHAT, COMPLETION, REFUSED, REQUEST, TAKEN
from serve.fields.messages import REASONING_NAMES

HEADER = "X-Headrace-Ignored"
MAX_HEADER_CHARS = 1000
"""Proxies limit all headers of a reply together, some to 4,096 bytes."""
MAX_NAME_CHARS = 100
UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
OTHER = "other"
AT_TOP = (REQUEST, CHAT, COMPLETION)
READ_BY_SOME = ("enable_thinking", "reasoning_effort", *(f"messages[].{name}" for name in REASONING_NAMES))
"""Honoured fields that are without effect where the model's chat template does not read them."""
KNOWN = frozenset(READ_BY_SOME) | frozenset(
    row.name if place in AT_TOP else f"{place}.{row.name}"
    for kinds in (TAKEN, REFUSED)
    for place, rows in kinds.items()
    for row in rows
)


def header_text(names: Iterable[str]) -> str:
    """The names, separated by commas; what does not fit is an ellipsis, what could harm a header a question mark."""
    text = ""
    for name in names:
        piece = ("" if not text else ", ") + UNSAFE.sub("?", name[:MAX_NAME_CHARS])
        if len(text) + len(piece) + len(", ...") > MAX_HEADER_CHARS:
            return text + ", ..."
        text += piece
    return text


def label(name: str) -> str:
    """The metric's label of a name: itself if it is in a table."""
    return name if name in KNOWN else OTHER
