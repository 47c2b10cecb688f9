"""The body of a request, whole and within its limit. Knows what werkzeug and gunicorn raise for one that is broken."""

from flask import Request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import BadRequest, ClientDisconnected, RequestEntityTooLarge


def read_body(request: Request) -> bytes:
    """The whole body. Raises werkzeug's 413 for one beyond --max-body, 408 for one that does not arrive, 400 for
    chunks that are none.

    A body in chunks says no length beforehand, and werkzeug cuts it at the limit without a word.
    """
    limit = request.max_content_length
    assert limit is not None  # always set, in serve/app.py
    too_large = RequestEntityTooLarge(f"the body is larger than {limit:,} bytes, the most that is taken (--max-body)")
    if (request.content_length or 0) > limit:
        raise too_large
    try:
        body = request.get_data(cache=False)
        if len(body) == limit and request.environ["wsgi.input"].read(1):
            raise too_large
    except ParseException as error:
        raise BadRequest(f"the body's chunks are malformed: {error}"[:200]) from None
    except OSError:
        raise ClientDisconnected("the body did not arrive whole") from None
    return body
