"""Reads the body of a request: within its size limit, as a JSON object."""

import json
from typing import Any

from flask import Request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import BadRequest, ClientDisconnected, RequestEntityTooLarge, UnsupportedMediaType

from serve.access.middleware import current_record
from serve.fields.reading import read_object


def read_json(request: Request, *, is_logged: bool = False) -> dict[str, Any]:
    """The body as an object. Raises InvalidRequest, or werkzeug's 400, 408, 413 and 415."""
    if request.mimetype != "application/json":
        found = json.dumps(request.mimetype[:60])
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {found}")
    body = _read_body(request)
    if is_logged:
        current_record().body = body.decode("utf-8", "replace")
    return read_object(body)


def _read_body(request: Request) -> bytes:
    """The whole body. Raises werkzeug's 413 if it is larger than --max-body, 408 if it does not arrive, 400 for
    malformed chunks."""
    limit = request.max_content_length
    assert limit is not None  # always set, in serve/app.py
    too_large = RequestEntityTooLarge(f"the body is larger than {limit:,} bytes, the limit set by --max-body")
    if (request.content_length or 0) > limit:
        raise too_large
    try:
        body = request.get_data(cache=False)
        # A body in chunks does not tell its length, and werkzeug cuts it at the limit silently.
        if len(body) == limit and request.environ["wsgi.input"].read(1):
            raise too_large
    except ParseException as error:
        raise BadRequest(f"the body's chunks are malformed: {error}"[:200]) from None
    except OSError:
        raise ClientDisconnected("the body did not arrive completely") from None
    return body
