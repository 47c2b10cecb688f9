"""How an exception is answered over HTTP: one table from its class to status, type and code.

Knows nothing of requests or models. The shape is OpenAI's: `{"error": {message, type, param, code}}`.
"""

import logging
from typing import Any, NamedTuple

from flask import Flask, Response, jsonify
from werkzeug.exceptions import ClientDisconnected, HTTPException

from runtime.errors import (
    EngineFailed,
    HeadraceError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    TimedOut,
    Unavailable,
    UnknownField,
    UnsupportedField,
)
from serve.access.rate_limits import RateLimitedError
from serve.hosts import ForeignHostError
from serve.replies.choices import ClientGoneError

log = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S = 5
"""Retry-After in seconds while the server starts or drains: about the duration of a restart."""


class UnauthorizedError(HeadraceError):
    """The request has no API key, or one that is not in the file."""


class NotAllowedError(HeadraceError):
    """The API key is known, but may not do this."""


class ErrorKind(NamedTuple):
    """The HTTP status, and the type and code of OpenAI's error object."""

    status: int
    type: str
    code: str | None


# Looked up along the class's ancestors: a new error needs a row only if it differs from its parent.
KINDS: dict[type[BaseException], ErrorKind] = {
    InvalidRequest: ErrorKind(400, "invalid_request_error", None),
    PromptTooLong: ErrorKind(400, "invalid_request_error", "context_length_exceeded"),
    UnsupportedField: ErrorKind(400, "invalid_request_error", "unsupported_parameter"),
    UnknownField: ErrorKind(400, "invalid_request_error", "unknown_parameter"),
    ModelNotFound: ErrorKind(404, "invalid_request_error", "model_not_found"),
    ForeignHostError: ErrorKind(403, "invalid_request_error", "host_not_allowed"),
    UnauthorizedError: ErrorKind(401, "authentication_error", "invalid_api_key"),
    NotAllowedError: ErrorKind(403, "permission_error", "not_allowed"),
    RateLimitedError: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: ErrorKind(429, "rate_limit_error", "overloaded"),
    Unavailable: ErrorKind(503, "server_error", "unavailable"),
    TimedOut: ErrorKind(504, "server_error", "timeout"),
    EngineFailed: ErrorKind(500, "server_error", "engine_failed"),
    # nginx's status for a client that closed the connection. Only logs and metrics have it.
    ClientGoneError: ErrorKind(499, "invalid_request_error", "client_gone"),
    BaseException: ErrorKind(500, "server_error", "internal_error"),
}


def kind_of(error: BaseException) -> ErrorKind:
    """The row of the nearest ancestor. werkzeug's errors (404, 405, 413, 415) have their own status."""
    if isinstance(error, ClientDisconnected):
        return ErrorKind(408, "invalid_request_error", "request_incomplete")
    if isinstance(error, HTTPException):
        status = error.code or 500
        return ErrorKind(status, "invalid_request_error" if status < 500 else "server_error", None)
    return next(KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in KINDS)


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. An unexpected error is logged with its traceback and hidden from the client."""
    kind = kind_of(error)
    if isinstance(error, HTTPException):
        message = error.description or error.name
    elif isinstance(error, HeadraceError | ClientGoneError):
        message = str(error)
    else:
        log.error("internal error", exc_info=error)
        message = "internal error; the server's log has the traceback"
    return {
        "error": {
            "message": message,
            "type": kind.type,
            "param": getattr(error, "param", None),
            "code": kind.code,
        }
    }


def error_response(error: Exception) -> Response:
    """The whole reply, with Retry-After if waiting helps and Allow if the method was wrong."""
    response = jsonify(error_body(error))
    response.status_code = kind_of(error).status
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, Unavailable):
        response.headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
    elif isinstance(error, UnauthorizedError):
        response.headers["WWW-Authenticate"] = "Bearer"
    elif allowed := getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def register_errors(app: Flask) -> None:
    """Answer every exception of a view, and werkzeug's errors, in OpenAI's shape."""
    app.register_error_handler(Exception, error_response)
