"""The reply to bytes that are no valid HTTP request: gunicorn's errors in the JSON shape of all other errors.

Flask never sees these connections. Knows gunicorn's errors, nothing of sockets.
"""

import json
import uuid
from http import HTTPStatus
from typing import NamedTuple

from gunicorn.http import errors

MAX_REQUEST_LINE = 4094
MAX_HEADERS = 64
MAX_HEADER = 8190
"""Bytes of one header. With MAX_HEADERS it bounds what a client can make the server keep before the body."""
SHOWN_CHARS = 200
MESSAGES: dict[type[Exception], str] = {
    errors.LimitRequestLine: f"the request line is longer than {MAX_REQUEST_LINE:,} bytes",
    errors.LimitRequestHeaders: f"more than {MAX_HEADERS} headers, or one of more than {MAX_HEADER:,} bytes",
}
STATUSES: dict[type[Exception], HTTPStatus] = {
    errors.LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    errors.UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
    # Errors of the application, not of the client.
    errors.InvalidResponseHeader: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.InvalidResponseHeaderName: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.ConfigurationProblem: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Refusal(NamedTuple):
    """An HTTP status, and a sentence for the client."""

    status: HTTPStatus
    message: str

    @property
    def is_ours(self) -> bool:
        """Whether the fault is the server's."""
        return self.status == HTTPStatus.INTERNAL_SERVER_ERROR

    def to_bytes(self) -> bytes:
        """The whole reply, after which the connection closes."""
        kind = "server_error" if self.is_ours else "invalid_request_error"
        code = "internal_error" if self.is_ours else "malformed_request"
        error = {"message": self.message, "type": kind, "param": None, "code": code}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"X-Request-Id: {uuid.uuid4().hex}",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        )
        return "\r\n".join([*head, "", ""]).encode("ascii") + body


def refusal_of(error: BaseException) -> Refusal:
    """The reply to an error that happened before, or around, the application."""
    if not isinstance(error, errors.ParseException):
        return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log has the traceback")
    status = STATUSES.get(type(error), HTTPStatus.BAD_REQUEST)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return Refusal(status, "internal error; the server's log has the traceback")
    reason = MESSAGES.get(type(error), str(error))
    return Refusal(status, f"not a valid HTTP request: {reason}"[:SHOWN_CHARS])
