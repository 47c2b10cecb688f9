"""Translates the JSON schema of a request for the grammar's compiler and for the check of the complete answer.

`runtime/grammar/schema/repair.py` turns many dialects into one; `runtime/grammar/schema/reduction.py` then takes what a
grammar can enforce. A `strict` schema that needs more is refused, with the keywords named.
"""

import json
from typing import Any, NamedTuple

from runtime.core import LateCheck
from runtime.errors import InvalidRequest
from runtime.grammar.schema.reduction import reduce_schema
from runtime.grammar.schema.repair import repair_schema

MAX_NAMED = 20
"""Most places that a response header names."""
MAX_REFUSED = 3
"""Most places that an error names."""


class TranslatedSchema(NamedTuple):
    """source: JSON for the compiler; late_checks: for the complete answer, one or none."""

    source: str
    late_checks: tuple[LateCheck, ...] = ()


def translate_schema(schema: Any, *, param: str, is_strict: bool, tool: str | None = None) -> TranslatedSchema:
    """Translate a client's schema into one that compiles, in time linear in its size.

    tool: the function whose arguments it describes. Raises InvalidRequest, naming `param` and the place, for a
    malformed schema, or if `is_strict` and the grammar cannot enforce all of it."""
    repaired = repair_schema(schema, param=param)
    try:
        reduced = reduce_schema(repaired, param=param, is_strict=is_strict)
        source = json.dumps(reduced.schema, separators=(",", ":"))
    except RecursionError:
        raise InvalidRequest(f"{param}: the JSON schema is nested too deeply", param=param) from None
    left_out = reduced.left_out
    if left_out and is_strict:
        names = [f"`{place.name}` at {place.outer.shown() if place.outer else ''}" for place in left_out[:MAX_REFUSED]]
        more = f" and {len(left_out) - MAX_REFUSED} more" if len(left_out) > MAX_REFUSED else ""
        raise InvalidRequest(
            f"{param}: strict is true, and an answer cannot be held to {', '.join(names)}{more} while it is written; "
            "without strict it is checked for that when it is complete",
            param=param,
        )
    if not left_out and reduced.is_exact:
        return TranslatedSchema(source)
    check = LateCheck(
        schema=json.dumps(repaired, separators=(",", ":")),
        left_out=tuple(place.pointer() for place in left_out[:MAX_NAMED]),
        num_left_out=len(left_out),
        tool=tool,
    )
    return TranslatedSchema(source, (check,))
