"""Log lines: one each, whatever a client sent, in the format that was asked for."""

import json
import logging
import sys
from typing import Any

import pytest

from serve.observe.logs import make_formatter

EVIL = 'a"\nPOST /v1/models status=200\r\x1b[2J\x9b31m\x7f\u2028\u202e\ud83d = \u00e9 \u4e2d'
"""Line ends, terminal codes of two kinds, a direction mark, half a surrogate pair; and text that is none of that."""


def record(message: str, *values: Any, **extra: Any) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 1, message, values, **({"exc_info": None} | extra))


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_that_was_sent_begins_a_line_or_moves_a_cursor(log_format: str) -> None:
    event = record("refused %s", EVIL)
    event.fields = {"request_id": "mine-1", "body": EVIL, "model": "a b status=200", "key": None}
    line = make_formatter(log_format).format(event)
    assert line.isprintable(), "one line without control characters"
    assert line.encode(), "which can be encoded"
    assert "\u00e9 \u4e2d" in line, "text stays text"
    if log_format == "json":
        value = json.loads(line)
        assert (value["message"], value["body"]) == (f"refused {EVIL}", EVIL)
        assert value["key"] is None
    else:
        assert line.startswith("refused a") and " request_id=mine-1 " in line and " key=" not in line
        assert ' model="a b status=200"' in line, "a value of several words does not pass for further fields"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_forges_no_line(log_format: str) -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        text = make_formatter(log_format).format(record("it failed", exc_info=sys.exc_info()))
    first, *others = text.split("\n")
    assert all(line.isprintable() for line in (first, *others))
    if log_format == "json":
        assert not others and "ValueError: a" in json.loads(first)["traceback"]
    else:
        assert first == "it failed" and all(line.startswith("    ") for line in others)
        assert any("ValueError: a" in line for line in others)
