"""GET /healthz, /readyz and /metrics: what orchestrators and Prometheus ask. Answered while models load, too.

/healthz is liveness: 503 only when an engine has failed, which nothing but a reload or a restart mends.
/readyz is whether to send requests here: 503 also while a model loads and while the server drains.
"""

from flask import Blueprint, Response, jsonify

from serve.errors import UNAVAILABLE_RETRY_S
from serve.replying import Context


def health_blueprint(context: Context) -> Blueprint:
    """The routes of this module."""
    blueprint = Blueprint("health", __name__)
    models = context.models

    @blueprint.get("/health")  # what vLLM's server and the load generators made for it say
    @blueprint.get("/healthz")
    def healthz() -> Response:
        if reasons := list(models.failures()):
            return _unwell("failed", "; ".join(reasons))
        return jsonify({"status": "ok"})

    @blueprint.get("/readyz")
    def readyz() -> Response:
        if reasons := list(models.failures()):
            return _unwell("failed", "; ".join(reasons))
        statuses = models.statuses()
        if waiting := [f"{name} is {status}" for name, status in statuses.items() if status != "ready"]:
            return _unwell("unavailable", ", ".join(waiting))
        return jsonify({"status": "ready", "models": list(statuses)})

    @blueprint.get("/metrics")
    def metrics() -> Response:
        text, content_type = context.metrics.render(models.metrics_and_stats())
        return Response(text, content_type=content_type)

    return blueprint


def _unwell(status: str, reason: str) -> Response:
    response = jsonify({"status": status, "reason": reason})
    response.status_code = 503
    response.headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
    return response
