"""A JSON schema of a request, as the grammar's compiler takes it and as the complete answer is held against it.

Two steps: `runtime/grammar/schema/repair.py` makes the many dialects into one, `runtime/grammar/schema/reduction.py`
takes from that what a grammar can hold. Whoever asks for `strict` is told what is missing instead.
"""

import json
from typing import Any, NamedTuple

from runtime.core import LateCheck
from runtime.errors import InvalidRequest
from runtime.grammar.schema.reduction import reduce_schema
from runtime.grammar.schema.repair import repair_schema

MAX_NAMED = 20
"""Most places that are named in a header."""
MAX_REFUSED = 3
"""Most that are named in an error."""


class TranslatedSchema(NamedTuple):
    """source: JSON for the compiler; late_checks: what is left for the complete answer, one or none."""

    source: str
    late_checks: tuple[LateCheck, ...] = ()


def translate_schema(schema: Any, *, param: str, is_strict: bool, tool: str | None = None) -> TranslatedSchema:
    """Make a schema of the wild one that compiles. Costs time in proportion to the schema's size.

    tool: the function whose arguments it is for. Raises InvalidRequest, naming `param` and the place, if it is no
    schema, or if `is_strict` and the grammar cannot hold all of it.
    """
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
