"""Around every view: the request's record and id, the Host check, the key and its limits, and the callbacks at its end.

Health checks, the page with its files and the OpenAPI document need no key: without one they tell nothing about
requests or models.
"""

import re
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from flask import Flask, Response, g, request
from flask_cors import CORS
from werkzeug.exceptions import BadRequest

from serve.access.api_keys import ApiKey, KeyRing
from serve.access.errors import NotAllowedError, UnauthorizedError
from serve.access.rate_limits import RateLimits
from serve.access.record import RequestRecord, request_id_of
from serve.fields import ignored
from serve.hosts import ANY, HostRule, plain_origin
from serve.replies.unenforced import CHECK_HEADER, UNENFORCED_HEADER
from serve.settings import ServerSettings

OPEN_ROUTES = frozenset({"/", "/page/<name>", "/health", "/healthz", "/readyz", "/openapi.json"})
LIMITED_ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})
"""Routes that use a model or a tokenizer. The others do not count against a key."""
FIRST_REFUSAL = 400
"""A reply with this status or a higher one costs a key only the tokens that were generated."""
TRACE_HEADERS = ("traceparent", "tracestate")
EXPOSED_HEADERS = (
    "X-Request-Id",
    ignored.HEADER,
    "Retry-After",
    UNENFORCED_HEADER,
    CHECK_HEADER,
    *(f"x-ratelimit-{figure}-{what}" for figure in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
)
OnEnd = Callable[[RequestRecord], None]


class Access:
    """Who may call, how much, and which requests are running. With `keys` None everybody may call."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self.keys = keys
        self.limits = RateLimits()
        self.live = LiveRequests()

    def replace_keys(self, keys: KeyRing) -> None:
        """From now on only these keys are valid. Running requests of other keys are ended."""
        self.keys = keys
        for record in self.live.records():
            if record.key is not None and record.key not in keys and record.choices is not None:
                record.choices.abort(UnauthorizedError(f"the key {record.key.name} was revoked"))

    def identify(self, authorization: str | None) -> ApiKey | None:
        """The key of an Authorization header; None if the server has no keys. Raises UnauthorizedError."""
        if self.keys is None:
            return None
        scheme, _, presented = (authorization or "").partition(" ")
        key = self.keys.find(presented.strip())
        if scheme.lower() != "bearer" or key is None:
            what = "this API key is unknown" if presented else "an API key is needed"
            raise UnauthorizedError(f"{what}: send the header Authorization: Bearer KEY")
        return key

    def may_see_details(self, authorization: str | None) -> bool:
        """Whether an open route may name models and errors: always without keys, else only to a request with a key."""
        try:
            self.identify(authorization)
        except UnauthorizedError:
            return False
        return True


class LiveRequests:
    """The requests for which a model is generating."""

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
    """The record of the current request."""
    record: RequestRecord = g.record
    return record


def check_may_measure() -> None:
    """Raise NotAllowedError if the current request's key may not read the metrics."""
    if not may_measure():
        raise NotAllowedError(
            "this API key may not read the metrics of all keys; `headrace key NAME --metrics` makes one that may"
        )


def may_measure() -> bool:
    """Whether the current request may read the metrics of all keys, which reveal lengths of other keys' prompts."""
    key = current_record().key
    return key is None or key.may_read_metrics


def on_end(callback: OnEnd) -> None:
    """Call `callback` when the current request has ended. The last one added is called first."""
    g.on_end.append(callback)


def register_access(app: Flask, access: Access, settings: ServerSettings, on_every_end: OnEnd) -> None:
    """Run the checks before every view; afterwards set the headers and call `on_every_end`."""
    hosts = HostRule(settings.host, settings.allowed_host)

    @app.before_request
    def begin() -> None:
        # The record comes first, so that refusals have an id and are counted too.
        route = request.url_rule.rule if request.url_rule else "unmatched"
        proposed = request.headers.get("X-Request-Id")
        trace_headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        g.record = RequestRecord(
            request_id=request_id_of(proposed),
            method=request.method,
            route=route,
            peer=request.remote_addr,
            trace_headers=trace_headers,
        )
        g.on_end = [on_every_end]
        hosts.check(_called_host(), has_keys=access.keys is not None)
        if route in OPEN_ROUTES or request.method == "OPTIONS":
            return
        g.record.key = access.identify(request.headers.get("Authorization"))
        if route in LIMITED_ROUTES and g.record.key is not None:
            reservation = g.record.reservation = access.limits.begin(g.record.key)
            g.on_end.append(lambda record: access.limits.end(reservation, record.num_generated_tokens))

    @app.after_request
    def finish(response: Response) -> Response:
        record, callbacks = current_record(), g.on_end
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        if record.reservation is not None:
            access.limits.settle(record.reservation, is_refused=record.status >= FIRST_REFUSAL)
        if record.ignored:
            response.headers[ignored.HEADER] = ignored.header_text(record.ignored)
        if record.key is not None:
            response.headers.extend(access.limits.headers(record.key))

        @response.call_on_close
        def on_close() -> None:
            record.ended_s = time.monotonic()
            while callbacks:
                callbacks.pop()(record)

        return response

    if settings.cors_origin:
        # `*` allows every page, but without cookies; this server has none.
        CORS(
            app,
            origins=[origin if origin == ANY else _exactly(plain_origin(origin)) for origin in settings.cors_origin],
            expose_headers=list(EXPOSED_HEADERS),
            max_age=600,
        )


def _called_host() -> str | None:
    """The server's name in the current request (RFC 9112, section 3.2); None if an HTTP/1.0 request has none."""
    target = request.environ.get("RAW_URI", "/")
    if not target.startswith(("/", "*")):
        return urlsplit(target).netloc  # a whole URL, as for a proxy, overrides the header
    host: str | None = request.environ.get("HTTP_HOST")
    if host is None and request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1":
        raise BadRequest("a request of HTTP/1.1 needs the header Host")
    return host


def _exactly(origin: str) -> re.Pattern[str]:
    """A pattern for this one origin. flask-cors would read a string with `[` or `*` as a pattern."""
    return re.compile(re.escape(origin) + r"\Z")
