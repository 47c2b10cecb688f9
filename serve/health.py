"""GET /healthz, /readyz and /metrics: what orchestrators and Prometheus ask.

/healthz is liveness: 503 only when the engine has failed, which nothing but a restart mends. /readyz is
whether to send requests here: 503 also while the server drains. Before the model is loaded neither is
answered; connections wait in the listen queue.
"""

from flask import Blueprint, Response, jsonify

from serve.errors import UNAVAILABLE_RETRY_S
from serve.replying import Context


def health_blueprint(context: Context) -> Blueprint:
    """The routes of this module."""
    blueprint = Blueprint("health", __name__)
    model = context.model

    @blueprint.get("/healthz")
    def healthz() -> Response:
        if model.failure is not None:
            return _unwell("failed", model.failure)
        return jsonify({"status": "ok"})

    @blueprint.get("/readyz")
    def readyz() -> Response:
        if model.failure is not None:
            return _unwell("failed", model.failure)
        if not model.is_ready:
            return _unwell("unavailable", "starting or draining")
        return jsonify({"status": "ready", "model": model.name})

    @blueprint.get("/metrics")
    def metrics() -> Response:
        text, content_type = context.metrics.render(model.stats())
        return Response(text, content_type=content_type)

    return blueprint


def _unwell(status: str, reason: str) -> Response:
    response = jsonify({"status": status, "reason": reason})
    response.status_code = 503
    response.headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
    return response
