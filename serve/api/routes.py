"""Paths as clients write them: without /v1, with it twice, with an extra slash; and the replies to wrong paths.

Knows the routes from the application's own map, nothing of what they do.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Flask, Response, request
from werkzeug.exceptions import MethodNotAllowed, NotFound

from serve.access.errors import error_response
from serve.fields.checks import shown

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PREFIX = "v1"
API_PATHS = {"chat/completions", "completions", "models"}
"""Below /v1. A model's name may follow `models`."""
PLAIN_PATHS = {"tokenize", "detokenize"}
MODELS = "models/"
FOREIGN_PATHS = {
    "responses": "OpenAI's Responses",
    "assistants": "OpenAI's Assistants",
    "threads": "OpenAI's Assistants",
    "batches": "OpenAI's batches",
    "files": "OpenAI's files",
    "moderations": "moderation",
    "embeddings": "embeddings",
    "audio": "speech",
    "images": "images",
    "realtime": "OpenAI's Realtime",
    "messages": "Anthropic's Messages",
    "complete": "Anthropic's completions",
    "api": "Ollama's API",
    "generate": "text-generation-inference's API",
    "generate_stream": "text-generation-inference's API",
    "completion": "llama.cpp's own API",
    "infill": "filling in the middle",
    "rerank": "ranking",
    "score": "ranking",
    "engines": "OpenAI's older API",
    "openai": "Azure's paths",
}
"""Other APIs, by the first part of the path below /v1."""
HIDDEN = ("/page/",)


def canonical(path: str) -> str:
    """The path of the route that a client means; any other path unchanged."""
    parts = [part for part in path.split("/") if part]
    while parts[:1] == [PREFIX]:
        parts = parts[1:]
    rest = "/".join(parts)
    if rest in API_PATHS or rest.startswith(MODELS):
        return f"/{PREFIX}/{rest}"
    return f"/{rest}" if rest in PLAIN_PATHS else path


class CanonicalPaths:
    """WSGI middleware that rewrites paths before routing. A redirect would lose the body of a POST."""

    def __init__(self, app: "WSGIApplication") -> None:
        self._app = app

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        environ["PATH_INFO"] = canonical(environ.get("PATH_INFO", ""))
        return self._app(environ, start_response)


def register_routes(app: Flask) -> None:
    """Accept every spelling of a path. The reply to an unknown path lists the routes."""
    app.wsgi_app = CanonicalPaths(app.wsgi_app)  # type: ignore[method-assign]  # Flask's own seam
    app.register_error_handler(NotFound, lambda error: _not_found(app, error))
    app.register_error_handler(MethodNotAllowed, _wrong_method)


def _not_found(app: Flask, error: NotFound) -> Response:
    if request.url_rule is None:  # else a view has said what is missing
        parts = [part for part in request.path.split("/") if part not in ("", PREFIX)]
        foreign = FOREIGN_PATHS.get(parts[0]) if parts else None
        what = f" ({foreign})" if foreign else ""
        routes = ", ".join(_described(app))
        error.description = f"there is no {request.method} {shown(request.path)}{what} here; the routes are {routes}"
    return error_response(error)


def _wrong_method(error: MethodNotAllowed) -> Response:
    valid = " or ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
    error.description = f"the method of {request.path} must be {valid}, got {request.method}"
    return error_response(error)


def _described(app: Flask) -> list[str]:
    return [
        f"{method} {rule.rule.replace('<path:model_name>', 'NAME')}"
        for rule in app.url_map.iter_rules()
        if not rule.rule.startswith(HIDDEN)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]
