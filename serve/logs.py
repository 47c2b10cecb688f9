"""What the server writes: a line per request, and warnings and errors; as text or as JSON lines.

Prompts and answers are never in a line unless --log-prompts asks for them.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from serve.record import RequestRecord

ACCESS_LOGGER = "headrace.access"
MAX_LOGGED_BODY = 20_000
"""Characters of a request body in a log line, so that one request cannot write megabytes."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger and message, the traceback if there is one, and `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """The message alone, with the traceback if there is one; an access line shows its fields as NAME=VALUE."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        words = [f"{name}={value}" for name, value in fields.items() if value is not None and name != "body"]
        text = " ".join([super().format(record), *words])
        return text + (f"\n{fields['body']}" if fields.get("body") else "")


def configure_logging(log_format: str) -> None:
    """Access lines to standard output, warnings and errors to standard error."""
    formatter = JsonFormatter() if log_format == "json" else TextFormatter()
    root, access = logging.getLogger(), logging.getLogger(ACCESS_LOGGER)
    for logger, stream, level in ((root, sys.stderr, logging.WARNING), (access, sys.stdout, logging.INFO)):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
    access.propagate = False


def write_access_line(record: RequestRecord) -> None:
    """The line of a request that has ended."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
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
