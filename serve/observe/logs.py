"""The server's output: a line for each request, and warnings and errors, as text or as JSON lines.

Prompts and answers are never logged unless --log-prompts is set. Control characters are escaped, so that a client
cannot forge a log line or move the terminal's cursor.
"""

import json
import logging
import re
import sys
import textwrap
import threading
from datetime import UTC, datetime
from typing import Any

from serve.access.record import RequestRecord

ACCESS_LOGGER = "headrace.access"
MAX_LOGGED_BODY = 20_000
"""Most characters of a request body in a log line."""
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end a line, move a cursor, change the writing direction or cannot be encoded: C0, C1, Unicode's line
ends and direction marks, lone surrogates."""
PLAIN_VALUE = re.compile(r"[\w.:/+=@\[\]-]+", re.ASCII)
INDENT = "    "

log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, perhaps a traceback, and `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _escaped(json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """The message on one line, followed by fields as NAME=VALUE; a traceback is indented below."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        words = [f"{name}={_shown(value)}" for name, value in fields.items() if value is not None]
        line = _escaped(" ".join([record.getMessage(), *words]))
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join([line, textwrap.indent("\n".join(map(_escaped, trace)), INDENT)])


def _shown(value: Any) -> str:
    """A single word as it is; any other value as JSON, so that it cannot look like more fields."""
    text = str(value)
    return text if PLAIN_VALUE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """The text without control characters. The escapes are those of JSON."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def make_formatter(log_format: str) -> logging.Formatter:
    """The formatter of --log-format."""
    return JsonFormatter() if log_format == "json" else TextFormatter()


def configure_logging(log_format: str) -> None:
    """Send access lines to standard output; warnings, errors and exceptions of threads to standard error."""
    formatter = make_formatter(log_format)
    root, access = logging.getLogger(), logging.getLogger(ACCESS_LOGGER)
    for logger, stream, level in ((root, sys.stderr, logging.WARNING), (access, sys.stdout, logging.INFO)):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
    access.propagate = False
    threading.excepthook = _log_dead_thread


def _log_dead_thread(end: threading.ExceptHookArgs) -> None:
    name = end.thread.name if end.thread is not None else "unknown"
    error = end.exc_value or end.exc_type()
    log.error("the thread %s ended: %s", name, end.exc_type.__name__, exc_info=error)


def write_access_line(record: RequestRecord) -> None:
    """Log a request that has ended."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "peer": record.peer,
        "key": record.key.name if record.key is not None else None,
        "model": record.model,
        "status": record.status,
        "seconds": round(record.seconds, 4),
    }
    if record.choices is not None:
        first = record.first_token_s
        fields |= {
            "prompt_tokens": record.choices.num_prompt_tokens,
            "completion_tokens": record.choices.num_generated_tokens,
            "first_token_seconds": None if first is None else round(first, 4),
        }
    if record.body is not None:
        fields["body"] = record.body[:MAX_LOGGED_BODY]
    logging.getLogger(ACCESS_LOGGER).info("%s %s", record.method, record.route, extra={"fields": fields})
