"""GET /openapi.json: the server's description of itself, made from the tables that check its requests.

A new row in a table of fields appears here automatically. A new route needs a row in OPERATIONS; a test fails without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flask import Flask, Response, jsonify

from runtime.core import RANGES, SamplingParams
from serve.access.middleware import OPEN_ROUTES
from serve.api.context import Context
from serve.api.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from serve.fields.checks import integer, number
from serve.fields.ignored import HEADER
from serve.fields.reading import Field, table_schema
from serve.fields.requests import CHAT_FIELDS, COMPLETION_FIELDS
from serve.fields.sampling import SAMPLING_NAMES
from serve.replies.schemas import REPLIES, TEXT, Json, ref

OPENAPI_VERSION = "3.2.0"
"""The first version that can describe the events of a stream."""
JSON, EVENTS = "application/json", "text/event-stream"
REQUEST_ERRORS = {400: "A field is wrong or not supported.", 404: "No such model.", 413: "The body is too large."}
MODEL_ERRORS = {
    500: "The engine failed.",
    503: "A model is loading, the server drains, or no slot came free in time.",
    504: "The request took too long.",
}
OTHER_ERRORS = {
    408: "The body did not arrive in time.",
    415: "The body is not JSON.",
    429: "The queue is full, or the key has reached its limit; Retry-After says when to try again.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route and method. `reply` is the name of a schema, or the media type of a reply that is not JSON."""

    summary: str
    reply: str
    table: Sequence[Field] | None = None
    request_name: str = ""
    chunk: str | None = None
    """Name of the schema of a stream's events."""
    unwell: bool = False
    """Whether a 503 has the shape of the health checks."""
    missing: str | None = None
    """Description of the 404, if the path names something."""


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation(
        summary="Answer a conversation",
        reply="ChatCompletion",
        table=CHAT_FIELDS,
        request_name="ChatCompletionRequest",
        chunk="ChatCompletionChunk",
    ),
    ("post", "/v1/completions"): Operation(
        summary="Continue a text",
        reply="Completion",
        table=COMPLETION_FIELDS,
        request_name="CompletionRequest",
        chunk="CompletionChunk",
    ),
    ("get", "/v1/models"): Operation(summary="The models that are loaded", reply="Models"),
    ("get", "/v1/models/{model_name}"): Operation(
        summary="One model: context length, precision, receipt", reply="Model", missing="No such model."
    ),
    ("post", "/tokenize"): Operation(
        summary="Token ids of a text or a conversation",
        reply="Tokens",
        table=TOKENIZE_FIELDS,
        request_name="TokenizeRequest",
    ),
    ("post", "/detokenize"): Operation(
        summary="Text of token ids", reply="Text", table=DETOKENIZE_FIELDS, request_name="DetokenizeRequest"
    ),
    ("get", "/healthz"): Operation(summary="Whether the process lives", reply="Healthy", unwell=True),
    ("get", "/health"): Operation(summary="The same, as other servers name it", reply="Healthy", unwell=True),
    ("get", "/readyz"): Operation(summary="Whether it takes requests", reply="Ready", unwell=True),
    ("get", "/status"): Operation(summary="What is running now", reply="Status"),
    ("get", "/metrics"): Operation(summary="Prometheus metrics", reply="text/plain"),
    ("get", "/openapi.json"): Operation(summary="This document", reply="Document"),
    ("get", "/"): Operation(summary="A page to talk to the models", reply="text/html"),
    ("get", "/page/{name}"): Operation(summary="The page's script and style", reply="*/*", missing="No such file."),
}


def document(*, is_strict: bool = False) -> Json:
    """The OpenAPI document, which does not depend on what is served. `is_strict`: unknown fields are a 400."""
    paths: dict[str, Json] = {}
    schemas: dict[str, Json] = {**REPLIES, "Document": {"type": "object", "required": ["openapi", "info", "paths"]}}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(path, operation)
        if operation.table is not None:
            schema = _request_schema(operation.table)
            schemas[operation.request_name] = _closed(schema) if is_strict else schema
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Headrace",
            "version": _version(),
            "description": "OpenAI's API, and routes to operate the server. A field that is not listed here is "
            + ("a 400." if is_strict else f"ignored; the reply's header {HEADER} names it."),
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def add_openapi_route(app: Flask, context: Context) -> None:
    """Add the route of this module to the application."""
    described = document(is_strict=context.settings.strict_fields)

    @app.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(described)


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


def _request_schema(table: Sequence[Field]) -> Json:
    """The table's schema. Fields of SamplingParams get its ranges and help texts."""
    schema = table_schema(table)
    helps = {item.name: item.metadata.get("help", "") for item in fields(SamplingParams)}
    for row in table:
        name, value = row.name, schema["properties"][row.name]
        if name in SAMPLING_NAMES and helps[name]:
            value.setdefault("description", helps[name])
        if name in SAMPLING_NAMES and name in RANGES and row.check in (number, integer):
            bounds = RANGES[name]
            value["exclusiveMinimum" if bounds.is_low_open else "minimum"] = _at_most_64_bits(bounds.low)
            if bounds.high is not None:
                value["maximum"] = _at_most_64_bits(bounds.high)
    return schema


def _closed(schema: Any) -> Any:
    """The same schema, with `additionalProperties` false in every table of fields."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    return closed | {"additionalProperties": False} if closed.get("additionalProperties") is True else closed


def _at_most_64_bits(bound: float) -> float:
    """A bound within the check of integers (serve/fields/checks.py), which excludes -2**63."""
    return max(bound, 1 - 2**63)


def _operation(path: str, operation: Operation) -> Json:
    errors = dict(MODEL_ERRORS) if path.startswith("/v1") or operation.table is not None else {}
    if operation.table is not None:
        errors |= REQUEST_ERRORS | OTHER_ERRORS
    if operation.missing is not None:
        errors[404] = operation.missing
    errors[403] = "The request's Host is not one of this server's names, or its API key may not do this."
    if path not in OPEN_ROUTES and path != "/page/{name}":
        errors[401] = "The server has API keys, and the request brings none that it knows."
    replies = {str(status): _error(text) for status, text in sorted(errors.items())}
    if operation.unwell:
        replies["503"] = {"description": "Not ready, with the reason.", "content": {JSON: {"schema": ref("Unwell")}}}
    described: Json = {
        "summary": operation.summary,
        "operationId": operation.summary.lower().replace(" ", "_").replace(",", "").replace(":", "").replace("'", ""),
        "responses": {"200": _answer(operation), **replies},
        "security": [{}] if "401" not in replies else [{}, {"key": []}],
    }
    if "{" in path:
        name = path.partition("{")[2].rstrip("}")
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": TEXT}]
    if operation.table is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(operation.request_name)}}}
    return described


def _answer(operation: Operation) -> Json:
    """The reply to a valid request. If the request has a body, the reply has the header for ignored fields."""
    answer: Json = {"description": "The answer.", "content": _content(operation)}
    if operation.table is not None:
        answer["headers"] = {HEADER: {"description": "The ignored fields, if any.", "schema": TEXT}}
    return answer


def _content(operation: Operation) -> Json:
    if "/" in operation.reply:
        return {operation.reply: {"schema": TEXT}}
    content: Json = {JSON: {"schema": ref(operation.reply)}}
    if operation.chunk is not None:
        data: Json = {"type": "string", "description": f"A {operation.chunk} or an Error as JSON; at the end [DONE]."}
        # `schema` would describe all events as an array (OpenAPI 3.2, sequential media types).
        event: Json = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content[EVENTS] = {
            "itemSchema": event | {"description": "A part of the answer, if `stream` is true."},
        }
    return content


def _error(text: str) -> Any:
    return {"description": text, "content": {JSON: {"schema": ref("Error")}}}
