"""From a checked request to an HTTP response, the same way for completions and chats.

Submits the generations, and streams their chunks or folds them into one JSON object.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from flask import Request, Response, jsonify

from runtime.errors import InvalidRequest
from runtime.text_model import TextModel
from serve.access.errors import error_body, kind_of
from serve.access.middleware import current_record, on_end
from serve.access.record import RequestRecord
from serve.api.context import Context
from serve.fields.requests import GenerationRequest
from serve.replies.choices import Choices, Client, ClientGoneError, submit
from serve.replies.openai import Json, ReplyShape, chunks_of, usage
from serve.replies.unenforced import CHECK_HEADER, UNENFORCED_HEADER, AnswerChecks, unenforced


def check_choices(context: Context, num_prompts: int, n: int) -> None:
    """Raise InvalidRequest if a request has too many choices. Called before anything is tokenized."""
    if num_prompts * n > context.settings.max_choices:
        raise InvalidRequest(
            f"{num_prompts} prompts times n={n} are {num_prompts * n} choices; "
            f"a request may have at most {context.settings.max_choices}",
            param="n",
        )


def start(
    context: Context, request: Request, model: TextModel, wanted: GenerationRequest, prompts: Sequence[list[int]]
) -> Choices:
    """Submit all choices of a request, or none. Raises what `TextModel.generate` raises, and RateLimitedError."""
    planned = [
        (prompt_ids, [wanted.for_choice(idx, len(prompt_ids), model.max_len) for idx in range(wanted.n)])
        for prompt_ids in prompts
    ]
    record = current_record()
    _check_priority(record, wanted.options.priority, context.settings.priority)
    if record.reservation is not None:
        context.access.limits.reserve_prompt(record.reservation, sum(map(len, prompts)))
    # Prefix caches are separate for each key, and within a key for each salt of the client.
    salt = wanted.options.cache_salt
    salt = f"{record.tenant}\0{salt}" if record.tenant else salt
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
    """Raise InvalidRequest if the request asks for a more urgent priority than its key, or --priority, allows."""
    most_urgent, whom = for_everybody, "requests to this server"
    if record.key is not None and record.key.priority is not None:
        most_urgent, whom = record.key.priority, f"the key {record.key.name}"
    if asked < most_urgent:
        raise InvalidRequest(f"priority must be at least {most_urgent} for {whom}, got {asked}", param="priority")


def respond(choices: Choices, shape: ReplyShape, wanted: GenerationRequest) -> Response:
    """Stream the chunks as server-sent events, or fold them into one JSON object.

    A stream's headers wait for the first event. So an error before it has its own status and Retry-After, which clients
    can handle.
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
    response.headers["X-Accel-Buffering"] = "no"  # nginx would otherwise buffer the tokens
    # A generator that never started does not run its `finally` when it is closed; this always runs.
    response.call_on_close(choices.close)
    return response


def _with_headers(response: Response, headers: Mapping[str, str | None]) -> Response:
    response.headers.update({name: value for name, value in headers.items() if value is not None})
    return response


def _events(chunks: Iterator[Json], record: RequestRecord, *, include_usage: bool) -> Iterator[bytes]:
    """The server-sent events, up to `[DONE]`.

    After the first byte, an error can only be one more event. The record, and so log, metrics and trace, gets the
    status that the error would have had.
    """
    try:
        for chunk in chunks:
            if include_usage or chunk.pop("usage") is None:
                yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except (ClientGoneError, GeneratorExit) as gone:
        # Noticed on the socket, or by a write that failed.
        record.status = kind_of(ClientGoneError()).status
        if isinstance(gone, GeneratorExit):
            raise
    except BaseException as error:
        record.status = kind_of(error).status
        yield _event(error_body(error))


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
