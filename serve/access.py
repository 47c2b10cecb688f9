"""Around every view: a record with an id, the key, the limits, and what is noted when the reply is out.

Open without a key are the two health checks, the page and its files, and the API's description: they say
nothing about requests or models.
"""

import threading
import time
from collections.abc import Callable

from flask import Flask, Response, g, request
from flask_cors import CORS

from serve.api_keys import ApiKey, KeyRing
from serve.errors import UnauthorizedError
from serve.rate_limits import RateLimits
from serve.record import RequestRecord, request_id_of
from serve.schema_replies import CHECK_HEADER, UNENFORCED_HEADER

OPEN_ROUTES = frozenset({"/", "/page/<name>", "/health", "/healthz", "/readyz", "/openapi.json"})
LIMITED_ROUTES = frozenset({"/v1/completions", "/v1/chat/completions"})
"""What costs a model's time; the rest is not counted against a key."""
TRACE_HEADERS = ("traceparent", "tracestate")
EXPOSED_HEADERS = (
    "X-Request-Id",
    "Retry-After",
    UNENFORCED_HEADER,
    CHECK_HEADER,
    *(f"x-ratelimit-{figure}-{what}" for figure in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
)
OnEnd = Callable[[RequestRecord], None]


class Access:
    """Who may call. `keys` None lets everybody; they can be replaced while the server runs."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self.keys = keys
        self.limits = RateLimits()

    def identify(self, authorization: str | None) -> ApiKey | None:
        """The key of an Authorization header; None where none is needed. Raises UnauthorizedError."""
        if self.keys is None:
            return None
        scheme, _, presented = (authorization or "").partition(" ")
        key = self.keys.find(presented.strip())
        if scheme.lower() != "bearer" or key is None:
            what = "this API key is not known" if presented else "an API key is needed"
            raise UnauthorizedError(f"{what}: send the header Authorization: Bearer KEY")
        return key


class LiveRequests:
    """The generating requests that are being answered now."""

    def __init__(self) -> None:
        self._records: dict[int, RequestRecord] = {}
        self._lock = threading.Lock()

    def add(self, record: RequestRecord) -> None:
        with self._lock:
            self._records[id(record)] = record

    def remove(self, record: RequestRecord) -> None:
        with self._lock:
            self._records.pop(id(record), None)

    def records(self) -> list[RequestRecord]:
        """In the order of their arrival."""
        with self._lock:
            return list(self._records.values())


def current_record() -> RequestRecord:
    """The record of the request that this thread answers."""
    record: RequestRecord = g.record
    return record


def on_end(callback: OnEnd) -> None:
    """Call `callback` once the reply of the current request is out or given up; last given, first called."""
    g.on_end.append(callback)


def register_access(app: Flask, access: Access, cors_origins: tuple[str, ...], on_every_end: OnEnd) -> None:
    """Put record, key and limits before every view, and their headers and `on_every_end` behind it."""

    @app.before_request
    def begin() -> None:
        # First of all, so that even a refusal has an id and is counted.
        route = request.url_rule.rule if request.url_rule else "unmatched"
        proposed = request.headers.get("X-Request-Id")
        trace_headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        g.record = RequestRecord(
            request_id=request_id_of(proposed), method=request.method, route=route, trace_headers=trace_headers
        )
        g.on_end = [on_every_end]
        if route in OPEN_ROUTES or request.method == "OPTIONS":
            return
        g.record.key = access.identify(request.headers.get("Authorization"))
        if route in LIMITED_ROUTES and g.record.key is not None:
            access.limits.take_request(g.record.key)

    @app.after_request
    def finish(response: Response) -> Response:
        record, callbacks = current_record(), g.on_end
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        if record.key is not None:
            response.headers.extend(access.limits.headers(record.key))

        @response.call_on_close
        def on_close() -> None:
            record.ended_s = time.monotonic()
            while callbacks:
                callbacks.pop()(record)

        return response

    if cors_origins:
        # `*` allows every page, but never with cookies: this server knows none.
        CORS(app, origins=list(cors_origins), expose_headers=list(EXPOSED_HEADERS), max_age=600)
