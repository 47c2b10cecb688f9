"""From a parsed request to an HTTP response, the same way for both calls; and what every view is given.

The only module that knows both Flask and the generator of chunks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flask import Request, Response, jsonify
from werkzeug.exceptions import UnsupportedMediaType

from runtime.errors import InvalidRequest
from runtime.text_model import TextModel
from serve.access import Access, LiveRequests, current_record, on_end
from serve.choices import Choices, Client, submit
from serve.errors import ClientGoneError, error_body
from serve.fields import read_object
from serve.http_metrics import HttpMetrics
from serve.model_registry import ModelRegistry
from serve.openai_replies import Json, ReplyShape, chunks_of, usage
from serve.openai_requests import GenerationRequest
from serve.record import RequestRecord
from serve.schema_replies import CHECK_HEADER, UNENFORCED_HEADER, AnswerChecks, unenforced
from serve.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Context:
    """What the views work with, made once per application."""

    models: ModelRegistry
    settings: ServerSettings
    metrics: HttpMetrics
    access: Access
    live: LiveRequests


def read_json(request: Request, *, is_logged: bool = False) -> dict[str, Any]:
    """The body as an object. Raises InvalidRequest, or werkzeug's 413 and 415."""
    if request.mimetype != "application/json":
        found = json.dumps(request.mimetype[:60])
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {found}")
    body = request.get_data(cache=False)
    if is_logged:
        current_record().body = body.decode("utf-8", "replace")
    return read_object(body)


def lease_model(context: Context, raw: Mapping[str, Any]) -> TextModel:
    """The model that a request names, kept open until its reply is out.

    Raises ModelNotFound, or Unavailable while it loads. A name that is missing or no text gives the default
    model: the table of fields will say what is wrong.
    """
    name = raw.get("model")
    generation = context.models.lease(name if isinstance(name, str) else context.models.default.name)
    on_end(lambda _: context.models.release(generation))
    current_record().model = generation.model.name
    return generation.model


def start(
    context: Context, request: Request, model: TextModel, wanted: GenerationRequest, prompts: Sequence[list[int]]
) -> Choices:
    """Submit every choice of a request, all or none. Raises what `TextModel.generate` raises, and RateLimitedError."""
    num_choices = len(prompts) * wanted.n
    if num_choices > context.settings.max_choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts times n={wanted.n} are {num_choices} choices; "
            f"at most {context.settings.max_choices} fit in one request",
            param="n",
        )
    planned = [
        (prompt_ids, [wanted.for_choice(idx, len(prompt_ids), model.max_len) for idx in range(wanted.n)])
        for prompt_ids in prompts
    ]
    record = current_record()
    if record.key is not None:
        context.access.limits.take_prompt(record.key, sum(map(len, prompts)))
    options = replace(wanted.options, cache_salt=_salt(record.tenant, wanted.options.cache_salt))
    choices = submit(model, planned, Client(request.environ.get("gunicorn.socket")), options=options)
    record.choices = choices
    context.live.add(record)
    on_end(lambda record: _settle(context, record))
    return choices


def _salt(tenant: str, own: str) -> str:
    """What separates prefix caches: whoever holds a key, and within that what the client says."""
    return f"{tenant}\0{own}" if tenant else own


def _settle(context: Context, record: RequestRecord) -> None:
    """Book what was generated, and take the request out of the live view."""
    context.live.remove(record)
    for outcome in record.schema_checks.outcomes if record.schema_checks is not None else ():
        context.metrics.on_schema_check(outcome)
    if record.key is not None and record.choices is not None:
        context.access.limits.book_answer(record.key, record.choices.num_generated_tokens)


def respond(choices: Choices, shape: ReplyShape, wanted: GenerationRequest) -> Response:
    """Stream the chunks as server-sent events, or fold them into one JSON object."""
    constraint = wanted.params.constraint
    late_checks = () if constraint is None else constraint.late_checks
    checks = current_record().schema_checks = AnswerChecks(late_checks)
    headers = {UNENFORCED_HEADER: unenforced(late_checks)}
    chunks = chunks_of(choices, shape, checks)
    if not wanted.is_stream:
        response = jsonify(shape.fold(chunks))
        headers[CHECK_HEADER] = checks.worst and checks.worst.value
        return _with_headers(response, headers)
    if wanted.has_running_usage:
        chunks = (chunk | {"usage": usage(choices)} for chunk in chunks)
    response = Response(_events(chunks, include_usage=wanted.include_usage), mimetype="text/event-stream")
    _with_headers(response, headers)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would otherwise hold the tokens back
    # A generator that was never started runs no `finally` when it is closed; this runs in any case.
    response.call_on_close(choices.close)
    return response


def _with_headers(response: Response, headers: Mapping[str, str | None]) -> Response:
    response.headers.update({name: value for name, value in headers.items() if value is not None})
    return response


def _events(chunks: Iterator[Json], *, include_usage: bool) -> Iterator[bytes]:
    """Server-sent events up to `[DONE]`. After the first byte an error can only be one more event."""
    try:
        for chunk in chunks:
            if include_usage or chunk.pop("usage") is None:
                yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except ClientGoneError:
        return
    except Exception as error:
        yield _event(error_body(error))


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
