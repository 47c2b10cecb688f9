"""From a parsed request to an HTTP response, the same way for both calls; and what every view is given.

The only module that knows both Flask and the generator of chunks.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Request, Response, jsonify
from werkzeug.exceptions import UnsupportedMediaType

from runtime.errors import InvalidRequest
from runtime.text_model import TextModel
from serve.choices import Choices, Client, submit
from serve.errors import ClientGoneError, error_body
from serve.fields import read_object
from serve.metrics import ServerMetrics
from serve.openai_replies import Json, ReplyShape, chunks_of
from serve.openai_requests import GenerationRequest
from serve.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Context:
    """What the views work with, made once per application."""

    model: TextModel
    settings: ServerSettings
    metrics: ServerMetrics
    created: int
    """Unix time of the start, which OpenAI's model objects carry."""


def read_json(request: Request) -> dict[str, Any]:
    """The body as an object. Raises InvalidRequest, or werkzeug's 413 and 415."""
    if request.mimetype != "application/json":
        found = json.dumps(request.mimetype[:60])
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {found}")
    return read_object(request.get_data(cache=False))


def start(context: Context, request: Request, wanted: GenerationRequest, prompts: Sequence[list[int]]) -> Choices:
    """Submit every choice of a request, all or none. Raises what `TextModel.generate` raises."""
    num_choices = len(prompts) * wanted.n
    if num_choices > context.settings.max_choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts times n={wanted.n} are {num_choices} choices; "
            f"at most {context.settings.max_choices} fit in one request",
            param="n",
        )
    max_len = context.model.max_len
    planned = [
        (prompt_ids, [wanted.for_choice(idx, len(prompt_ids), max_len) for idx in range(wanted.n)])
        for prompt_ids in prompts
    ]
    return submit(context.model, planned, Client(request.environ.get("gunicorn.socket")), options=wanted.options)


def respond(choices: Choices, shape: ReplyShape, wanted: GenerationRequest) -> Response:
    """Stream the chunks as server-sent events, or fold them into one JSON object."""
    chunks = chunks_of(choices, shape)
    if not wanted.is_stream:
        return jsonify(shape.fold(chunks))
    response = Response(_events(chunks, include_usage=wanted.include_usage), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would otherwise hold the tokens back
    # A generator that was never started runs no `finally` when it is closed; this runs in any case.
    response.call_on_close(choices.close)
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
