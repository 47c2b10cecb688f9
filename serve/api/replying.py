"""From a parsed request to an HTTP response, the same way for both calls; and what every view is given.

The only module that knows both Flask and the generator of chunks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from flask import Request, Response, jsonify
from werkzeug.exceptions import UnsupportedMediaType

from runtime.errors import InvalidRequest, PromptTooLong
from runtime.text_model import TextModel
from serve.access.errors import error_body, kind_of
from serve.access.middleware import Access, current_record, on_end
from serve.access.record import RequestRecord
from serve.api.bodies import read_body
from serve.fields.reading import read_object, reading
from serve.fields.requests import GenerationRequest
from serve.model_registry import ModelRegistry
from serve.observe.http_metrics import HttpMetrics
from serve.replies.choices import Choices, Client, ClientGoneError, submit
from serve.replies.openai import Json, ReplyShape, chunks_of, usage
from serve.replies.unenforced import CHECK_HEADER, UNENFORCED_HEADER, AnswerChecks, unenforced
from serve.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Context:
    """What the views work with, made once per application."""

    models: ModelRegistry
    settings: ServerSettings
    metrics: HttpMetrics
    access: Access


def read_json(request: Request, *, is_logged: bool = False) -> dict[str, Any]:
    """The body as an object. Raises InvalidRequest, or werkzeug's 400, 408, 413 and 415."""
    if request.mimetype != "application/json":
        found = json.dumps(request.mimetype[:60])
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {found}")
    body = read_body(request)
    if is_logged:
        current_record().body = body.decode("utf-8", "replace")
    return read_object(body)


@contextmanager
def noted(context: Context) -> Iterator[None]:
    """Read the fields of the current request inside; its record has the names of those taken without effect."""
    with reading(is_strict=context.settings.strict_fields) as notes:
        current_record().ignored = notes.ignored
        yield


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """Let errors of the prompt name the field that it came from; engine and limits know prompts alone."""
    try:
        yield
    except InvalidRequest as error:
        if isinstance(error, PromptTooLong) or error.param == "prompt":
            error.param = param
        raise


def lease_model(context: Context, raw: dict[str, Any]) -> TextModel:
    """The model that a request names, kept open until its reply is out. Where any name will do, a missing one is set.

    Raises ModelNotFound, or Unavailable while it loads. A name that is missing or no text gives the default
    model: the table of fields will say what is wrong.
    """
    name = raw.get("model")
    if name is None and context.models.takes_any_name:
        name = raw["model"] = context.models.default.name
    generation = context.models.lease(name if isinstance(name, str) else context.models.default.name)
    on_end(lambda _: context.models.release(generation))
    current_record().model = generation.model.name
    return generation.model


def check_choices(context: Context, num_prompts: int, n: int) -> None:
    """Refuse a request for more choices than fit, before anything of it is tokenized. Raises InvalidRequest."""
    if num_prompts * n > context.settings.max_choices:
        raise InvalidRequest(
            f"{num_prompts} prompts times n={n} are {num_prompts * n} choices; "
            f"at most {context.settings.max_choices} fit in one request",
            param="n",
        )


def start(
    context: Context, request: Request, model: TextModel, wanted: GenerationRequest, prompts: Sequence[list[int]]
) -> Choices:
    """Submit every choice of a request, all or none. Raises what `TextModel.generate` raises, and RateLimitedError."""
    planned = [
        (prompt_ids, [wanted.for_choice(idx, len(prompt_ids), model.max_len) for idx in range(wanted.n)])
        for prompt_ids in prompts
    ]
    record = current_record()
    _check_priority(record, wanted.options.priority, context.settings.priority)
    if record.reservation is not None:
        context.access.limits.reserve_prompt(record.reservation, sum(map(len, prompts)))
    salt = _salt(record.tenant, wanted.options.cache_salt)
    options = replace(wanted.options, cache_salt=salt, tenant=record.tenant)
    if wanted.prediction:
        options = replace(options, prediction_ids=model.encode_prediction(wanted.prediction))
    client = Client(request.environ.get("gunicorn.socket"))
    choices = submit(model, planned, client, options=options, one_call_of=wanted.one_call_of)
    record.choices = choices
    context.access.live.add(record)
    on_end(context.access.live.remove)
    return choices


def _check_priority(record: RequestRecord, asked: int, for_everybody: int) -> None:
    """Being served before others is a right, of a key or by --priority of everybody. InvalidRequest without it."""
    most_urgent, whom = for_everybody, "requests to this server"
    if record.key is not None and record.key.priority is not None:
        most_urgent, whom = record.key.priority, f"the key {record.key.name}"
    if asked < most_urgent:
        raise InvalidRequest(f"priority must be at least {most_urgent} for {whom}, got {asked}", param="priority")


def _salt(tenant: str, own: str) -> str:
    """What separates prefix caches: whoever holds a key, and within that what the client says."""
    return f"{tenant}\0{own}" if tenant else own


def respond(choices: Choices, shape: ReplyShape, wanted: GenerationRequest) -> Response:
    """Stream the chunks as server-sent events, or fold them into one JSON object.

    A stream's head waits for the first event: what fails before it has a status of its own and Retry-After, which
    clients know how to handle.
    """
    constraint = wanted.params.constraint
    late_checks = () if constraint is None else constraint.late_checks
    checks = current_record().schema_checks = AnswerChecks(late_checks)
    headers = {UNENFORCED_HEADER: unenforced(late_checks)}
    chunks = chunks_of(choices, shape, checks)
    try:
        if not wanted.is_stream:
            response = jsonify(shape.fold(chunks))
            headers[CHECK_HEADER] = checks.worst and checks.worst.value
            return _with_headers(response, headers)
        choices.wait_for_first()
    except BaseException:
        choices.close()
        raise
    if wanted.has_running_usage:
        chunks = (chunk | {"usage": usage(choices)} for chunk in chunks)
    events = _events(chunks, current_record(), include_usage=wanted.include_usage)
    response = _with_headers(Response(events, mimetype="text/event-stream"), headers)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would otherwise hold the tokens back
    # A generator that was never started runs no `finally` when it is closed; this runs in any case.
    response.call_on_close(choices.close)
    return response


def _with_headers(response: Response, headers: Mapping[str, str | None]) -> Response:
    response.headers.update({name: value for name, value in headers.items() if value is not None})
    return response


def _events(chunks: Iterator[Json], record: RequestRecord, *, include_usage: bool) -> Iterator[bytes]:
    """Server-sent events up to `[DONE]`.

    After the first byte an error can only be one more event; the record, and with it log, metrics and trace, has the
    status that it would have had.
    """
    try:
        for chunk in chunks:
            if include_usage or chunk.pop("usage") is None:
                yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except (ClientGoneError, GeneratorExit) as gone:
        # Seen on the socket, or by a write that failed.
        record.status = kind_of(ClientGoneError()).status
        if isinstance(gone, GeneratorExit):
            raise
    except BaseException as error:
        record.status = kind_of(error).status
        yield _event(error_body(error))


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
