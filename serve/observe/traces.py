"""OpenTelemetry traces: a span for every request, sent to a collector. Off unless an endpoint is set.

Names follow OpenTelemetry's conventions for HTTP servers and for generative AI. A span never contains a prompt or an
answer. Needs `pip install 'headrace[otel]'`.
"""

import os
from typing import Any
from urllib.parse import urlsplit

from runtime.errors import InvalidSetting
from serve.access.record import RequestRecord

SAMPLER = "OTEL_TRACES_SAMPLER"
ENVIRONMENT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_PATH = "/v1/traces"
SEND_S = 2
"""Seconds to send a batch, with retries. A missing collector must not delay the server's end."""
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


def endpoint_of(flag: str | None) -> str | None:
    """The collector's URL: the flag, or OpenTelemetry's own variable. Raises InvalidSetting if it cannot be used."""
    endpoint = flag or os.environ.get(ENVIRONMENT)
    if not endpoint:
        return None
    if urlsplit(endpoint).scheme not in ("http", "https"):
        raise InvalidSetting(f"--otlp-endpoint must be like http://127.0.0.1:4318, got {endpoint!r}")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401 - checks that it is installed
    except ImportError:
        raise InvalidSetting(
            f"traces need `pip install 'headrace[otel]'`; or leave out --otlp-endpoint and unset {ENVIRONMENT}"
        ) from None
    return endpoint.rstrip("/")


class Traces:
    """Sends spans in batches, in the background. Create it after the fork: it has a thread."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        # OpenTelemetry's default obeys the flag in a client's traceparent, so a client could hide its requests. The
        # operator can choose that with OTEL_TRACES_SAMPLER.
        sampler = None if SAMPLER in os.environ else ALWAYS_ON
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "headrace"}), sampler=sampler)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint + TRACES_PATH, timeout=SEND_S)))
        self._tracer = self._provider.get_tracer("headrace")

    def on_end(self, record: RequestRecord) -> None:
        """Make the span of a request that has ended, in the client's trace if it sent one."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(record.trace_headers)
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=_nanoseconds(record.arrived_at),
        )
        if record.first_token_s is not None:
            span.add_event("first token", timestamp=_nanoseconds(record.arrived_at + record.first_token_s))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(record.arrived_at + record.seconds))

    def close(self) -> None:
        """Send the remaining spans. Gives up after SEND_S seconds."""
        self._provider.force_flush(SEND_S * 1000)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    values: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "headrace.request_id": record.request_id,
        "enduser.id": record.key.name if record.key is not None else None,
        "gen_ai.operation.name": OPERATIONS.get(record.route),
        "gen_ai.request.model": record.model,
    }
    if record.choices is not None:
        values |= {
            "gen_ai.usage.input_tokens": record.choices.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.choices.num_generated_tokens,
            "headrace.time_to_first_token": record.first_token_s,
        }
    return {name: value for name, value in values.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
