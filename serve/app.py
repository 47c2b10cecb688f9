"""The Flask application: the routes, with errors, access and metrics around them.

Knows nothing of processes, ports or signals; see serve/process/wsgi.py. Any WSGI server can run the application, and so
can Flask's test client.
"""

from flask import Flask
from flask.typing import ResponseReturnValue

from runtime.text_model import TextModel
from serve.access.errors import register_errors
from serve.access.middleware import Access, OnEnd, register_access
from serve.access.record import RequestRecord
from serve.api.chat import add_chat_route
from serve.api.completions import add_completions_route
from serve.api.context import Context
from serve.api.health import add_health_routes
from serve.api.models import add_models_routes
from serve.api.openapi import add_openapi_route
from serve.api.page import add_page_routes
from serve.api.routes import register_routes
from serve.api.status import add_status_route
from serve.api.tokenize import add_tokenize_routes
from serve.model_registry import ModelRegistry
from serve.observe.engine_metrics import EngineMetrics
from serve.observe.http_metrics import HttpMetrics
from serve.observe.logs import write_access_line
from serve.observe.traces import Traces
from serve.settings import ServerSettings

ADD_ROUTES = (
    add_completions_route,
    add_chat_route,
    add_models_routes,
    add_tokenize_routes,
    add_health_routes,
    add_status_route,
    add_openapi_route,
    add_page_routes,
)


class ViewDiedError(Exception):
    """A view raised something that is not an Exception: a panic in Rust code, or SystemExit. The reply is a 500."""


class Application(Flask):
    """Flask, except that nothing a view raises reaches the WSGI server, where it could end the process."""

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
    metrics: EngineMetrics | None = None,
    access: Access | None = None,
    traces: Traces | None = None,
) -> Flask:
    """Make the application. For a single model, `metrics` is the observer it was opened with."""
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
    for add_routes in ADD_ROUTES:
        add_routes(app, context)
    return app


def _at_end(context: Context, traces: Traces | None) -> OnEnd:
    """A callback that records a request when its last byte is out, or when its client has gone."""

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
