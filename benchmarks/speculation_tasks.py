"""What benchmarks/speculation.py asks a model: texts to copy, nothing to copy, and answers held to a form."""

import json
from typing import NamedTuple

from runtime.core import Constraint, ConstraintKind
from runtime.text.tools.formats import HERMES, Tool, calls_grammar

STORY = (
    "The ferry to the island leaves at nine in the morning and returns at six in the evening. Tickets cost twelve "
    "euros for adults and five euros for children under fourteen. Dogs travel free of charge, bicycles cost three "
    "euros. In winter the ferry runs on Saturdays only, and in heavy storms it does not run at all. Passengers should "
    "be at the pier twenty minutes before departure and keep their tickets ready for inspection."
)
PEOPLE = (
    "Anna Keller, 34, lives in Basel and works as a surveyor. Tom Briggs, 51, lives in Leeds and works as a baker. "
    "Mira Novak, 27, lives in Zagreb and works as a nurse. Luis Ortega, 45, lives in Murcia and works as a gardener."
)
LOG = "\n".join(
    f"2026-03-01T10:{minute:02}:00Z INFO worker-{minute % 3} finished job {1000 + minute} in {200 + 7 * minute} ms"
    for minute in range(12)
)
EXTRACT = f"List the people in this text as JSON with the fields name, age, city and job.\n\n{PEOPLE}"
TEXT, WHOLE = {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": 0, "maximum": 999}


class Task(NamedTuple):
    """One chat request."""

    name: str
    text: str
    constraint: Constraint | None = None


def _closed(properties: dict[str, dict[str, object]]) -> dict[str, object]:
    """The schema of an object with just these properties."""
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _held_to(schema: dict[str, object]) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "schema")


PERSON = _closed({"name": TEXT, "age": WHOLE, "city": TEXT, "job": TEXT})
TIMETABLE = _closed(
    {
        "departure_time": TEXT,
        "return_time": TEXT,
        "ticket_price_adults": WHOLE,
        "ticket_price_children": WHOLE,
        "bicycle_price": WHOLE,
        "dogs_travel_free": {"type": "boolean"},
        "runs_in_winter": {"enum": ["daily", "saturdays_only", "not_at_all"]},
        "minutes_before_departure": WHOLE,
    }
)
BOOKING = Tool(
    name="book_ferry_tickets",
    description="Book tickets for the ferry to the island",
    parameters=_closed(
        {
            "departure_date": {"type": "string", "pattern": "^2026-[01][0-9]-[0-3][0-9]$"},
            "number_of_adults": WHOLE,
            "number_of_children": WHOLE,
            "travels_with_bicycle": {"type": "boolean"},
            "contact_email_address": TEXT,
        }
    ),
)
CALL = Constraint(ConstraintKind.GRAMMAR, calls_grammar(HERMES, [BOOKING], is_parallel=False), "tools")

COPY = [
    Task("edit", f"Repeat this text exactly, but write the word ferry as boat.\n\n{STORY}"),
    Task("extract", EXTRACT),
    Task("log", f"Continue this log with twelve more lines of the same form.\n\n{LOG}"),
    Task("repeat", f"Repeat this text exactly.\n\n{STORY}"),
]
PLAIN = [
    Task("explain", "Why is the sky blue, and why are sunsets red?"),
    Task("story", "Write a short story about a lighthouse keeper who finds a letter."),
    Task("advice", "What should a beginner know before planting a vegetable garden?"),
    Task("history", "Describe how bread is made, from the field to the oven."),
]
HELD = [
    Task("people", EXTRACT, _held_to({"type": "array", "minItems": 4, "maxItems": 4, "items": PERSON})),
    Task("form", f"Fill in the form about this text as JSON.\n\n{STORY}", _held_to(TIMETABLE)),
    Task("call", "Book the ferry on 2 May 2026 for two adults, mail me at eva@example.org.", CALL),
]
