"""GET /healthz, /readyz and /metrics: what orchestrators and Prometheus ask. Answered while models load, too.

/healthz is liveness: 503 only when an engine has failed, which nothing but a reload or a restart mends.
/readyz is whether to send requests here: 503 also while a model loads and while the server drains.
Both are open without a key; where there are keys, the names of models and the engines' errors are for who brings one.
"""

from flask import Blueprint, Response, jsonify, request

from serve.access.errors import UNAVAILABLE_RETRY_S
from serve.access.middleware import check_may_measure
from serve.api.replying import Context

NOT_TOLD = "not ready; the reason is in the server's log, and here for who sends an API key"


def health_blueprint(context: Context) -> Blueprint:
    """The routes of this module."""
    blueprint = Blueprint("health", __name__)
    models = context.models

    def tells_details() -> bool:
        return context.access.may_see_details(request.headers.get("Authorization"))

    def unwell(status: str, reason: str) -> Response:
        response = jsonify({"status": status, "reason": reason if tells_details() else NOT_TOLD})
        response.status_code = 503
        response.headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
        return response

    @blueprint.get("/health")  # what vLLM's server and the load generators made for it say
    @blueprint.get("/healthz")
    def healthz() -> Response:
        if reasons := list(models.failures()):
            return unwell("failed", "; ".join(reasons))
        return jsonify({"status": "ok"})

    @blueprint.get("/readyz")
    def readyz() -> Response:
        if reasons := list(models.failures()):
            return unwell("failed", "; ".join(reasons))
        statuses = models.statuses()
        if waiting := [f"{name} is {status}" for name, status in statuses.items() if status != "ready"]:
            return unwell("unavailable", ", ".join(waiting))
        return jsonify({"status": "ready"} | ({"models": list(statuses)} if tells_details() else {}))

    @blueprint.get("/metrics")
    def metrics() -> Response:
        check_may_measure()
        text, content_type = context.metrics.render(models.metrics_and_stats())
        return Response(text, content_type=content_type)

    return blueprint
