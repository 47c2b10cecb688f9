"""The Flask application: blueprints over one `TextModel`, errors and metrics around them.

Knows nothing of processes, ports or signals; those are serve/wsgi.py's. Any WSGI server can run what this
makes, Flask's test client included.
"""

import time

from flask import Flask, Response, g, request

from runtime.text_model import TextModel
from serve.chat import chat_blueprint
from serve.completions import completions_blueprint
from serve.errors import register_errors
from serve.health import health_blueprint
from serve.metrics import ServerMetrics
from serve.models import models_blueprint
from serve.replying import Context
from serve.settings import ServerSettings

BLUEPRINTS = (completions_blueprint, chat_blueprint, models_blueprint, health_blueprint)


def create_app(model: TextModel, settings: ServerSettings | None = None, metrics: ServerMetrics | None = None) -> Flask:
    """Make the application. `metrics` should be the observer that `model` was opened with."""
    settings = settings or ServerSettings()
    context = Context(model, settings, metrics or ServerMetrics(), int(time.time()))
    app = Flask("headrace", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body
    app.json.sort_keys = False  # type: ignore[attr-defined]  # DefaultJSONProvider has it, the base class does not
    register_errors(app)
    for make_blueprint in BLUEPRINTS:
        app.register_blueprint(make_blueprint(context))
    _measure(app, context.metrics)
    return app


def _measure(app: Flask, metrics: ServerMetrics) -> None:
    """Count each response when its last byte is out, or when the client has gone."""

    @app.before_request
    def note_arrival() -> None:
        g.arrival = time.monotonic()

    @app.after_request
    def count(response: Response) -> Response:
        # The rule, not the path: paths are the client's to invent, and each would be a new time series.
        route = request.url_rule.rule if request.url_rule else "unmatched"
        arrival = g.get("arrival", time.monotonic())

        @response.call_on_close
        def on_close() -> None:
            metrics.on_response(route=route, status=response.status_code, request_s=time.monotonic() - arrival)

        return response
