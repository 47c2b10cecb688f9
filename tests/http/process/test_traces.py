"""Traces go to a real collector, small as it is: the exporter's own protocol over loopback."""

import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2 as httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from runtime.errors import InvalidSetting
from serve.observe.traces import endpoint_of
from tests.support.fake_text_model import NAME
from tests.support.server_process import running_server

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Any] = []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        assert self.path == "/v1/traces"
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_every_request_becomes_a_span_of_the_clients_trace(collector: Collector) -> None:
    with running_server("--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}") as server:
        body = {"model": NAME, "prompt": "the secret word", "max_tokens": 5, "ignore_eos": True}
        # The flag 00 asks not to be traced; a client must not be able to hide its requests.
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00", "X-Request-Id": "mine"}
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        httpx.get(f"{server.url}/nowhere")
        server.signal(signal.SIGTERM)
        assert server.wait()[::2] == (0, "")
    asked, missing = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert asked.name == "POST /v1/completions" and asked.trace_id.hex() == TRACE_ID
    assert asked.parent_span_id.hex() == PARENT_ID
    assert attributes(asked) | {"headrace.time_to_first_token": 0} == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "headrace.request_id": "mine",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": NAME,
        "gen_ai.usage.input_tokens": 15,
        "gen_ai.usage.output_tokens": 5,
        "headrace.time_to_first_token": 0,
    }
    (first,) = asked.events
    assert asked.start_time_unix_nano < first.time_unix_nano <= asked.end_time_unix_nano
    assert "secret" not in str(asked)
    assert attributes(missing)["http.response.status_code"] == 404 and missing.trace_id.hex() != TRACE_ID


def test_a_collector_that_is_not_there_harms_nobody() -> None:
    with running_server("--otlp-endpoint", "http://127.0.0.1:9") as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait()[0] == 0


def test_off_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert endpoint_of(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/")
    assert endpoint_of(None) == "http://collector:4318"
    with pytest.raises(InvalidSetting, match="--otlp-endpoint"):
        endpoint_of("collector:4318")
