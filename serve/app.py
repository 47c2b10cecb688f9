"""The Flask application: blueprints over the models, errors, access and metrics around them.

Knows nothing of processes, ports or signals; those are serve/process/wsgi.py's. Any WSGI server can run what this
makes, Flask's test client included.
"""

from flask import Flask
from flask.typing import ResponseReturnValue

from runtime.text_model import TextModel
from serve.access.errors import register_errors
from serve.access.middleware import Access, OnEnd, register_access
from serve.access.record import RequestRecord
from serve.api.chat import chat_blueprint
from serve.api.completions import completions_blueprint
from serve.api.health import health_blueprint
from serve.api.models import models_blueprint
from serve.api.openapi import openapi_blueprint
from serve.api.page import page_blueprint
from serve.api.replying import Context
from serve.api.routes import register_routes
from serve.api.status import status_blueprint
from serve.api.tokenize import tokenize_blueprint
from serve.model_registry import ModelRegistry
from serve.observe.engine_metrics import ServerMetrics
from serve.observe.http_metrics import HttpMetrics
from serve.observe.logs import write_access_line
from serve.observe.traces import Traces
from serve.settings import ServerSettings

BLUEPRINTS = (
    completions_blueprint,
    chat_blueprint,
    models_blueprint,
    tokenize_blueprint,
    health_blueprint,
    status_blueprint,
    openapi_blueprint,
    page_blueprint,
)


class ViewDiedError(Exception):
    """A view raised what is no Exception: a panic of a Rust library, SystemExit. Our bug or a library's: a 500."""


class Application(Flask):
    """Flask, but nothing that a view raises escapes to the WSGI server, where it would end the process."""

    def dispatch_request(self) -> ResponseReturnValue:
        try:
            return super().dispatch_request()
        except Exception:
            raise
        except BaseException as error:
            raise ViewDiedError(f"{type(error).__name__}: {error}") from error


def create_app(
    models: ModelRegistry | TextModel,
    settings: ServerSettings | None = None,
    metrics: ServerMetrics | None = None,
    access: Access | None = None,
    traces: Traces | None = None,
) -> Flask:
    """Make the application. A single model is a registry of one; `metrics` is then the observer it was opened with."""
    settings = settings or ServerSettings()
    access = access or Access()
    if isinstance(models, TextModel):
        models = ModelRegistry.of_one(models, metrics, aliases=settings.alias, takes_any_name=settings.any_model_name)
    context = Context(models, settings, HttpMetrics(), access)
    app = Application("headrace", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body
    app.json.sort_keys = False  # type: ignore[attr-defined]  # DefaultJSONProvider has it, the base class does not
    register_errors(app)
    register_routes(app)
    register_access(app, access, settings, _at_end(context, traces))
    for make_blueprint in BLUEPRINTS:
        app.register_blueprint(make_blueprint(context))
    return app


def _at_end(context: Context, traces: Traces | None) -> OnEnd:
    """What is noted of every request when its last byte is out, or when the client has gone."""

    def note(record: RequestRecord) -> None:
        for outcome in () if record.schema_checks is None else record.schema_checks.outcomes:
            context.metrics.on_schema_check(outcome)
        context.metrics.on_response(
            route=record.route, status=record.status, request_s=record.seconds, ignored=record.ignored
        )
        if context.settings.access_log:
            write_access_line(record)
        if traces is not None:
            traces.on_end(record)

    return note
