"""GET /healthz, /readyz and /metrics, for orchestrators and Prometheus. They answer while models load, too.

/healthz reports liveness: 503 only after an engine has failed, which only a reload or a restart repairs.
/readyz reports whether to send requests here: 503 also while a model loads and while the server drains.
Both are open without a key. If the server has keys, only requests with a key see the names of models and the errors.
"""

from flask import Flask, Response, jsonify, request

from serve.access.errors import UNAVAILABLE_RETRY_S
from serve.access.middleware import check_may_measure
from serve.api.context import Context

HIDDEN_REASON = "not ready; the reason is in the server's log, and here for requests with an API key"


def add_health_routes(app: Flask, context: Context) -> None:
    """Add the routes of this module to the application."""
    models = context.models

    def tells_details() -> bool:
        return context.access.may_see_details(request.headers.get("Authorization"))

    def unwell(status: str, reason: str) -> Response:
        response = jsonify({"status": status, "reason": reason if tells_details() else HIDDEN_REASON})
        response.status_code = 503
        response.headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
        return response

    @app.get("/health")  # the name in vLLM and its load generators
    @app.get("/healthz")
    def healthz() -> Response:
        if reasons := models.failures():
            return unwell("failed", "; ".join(reasons))
        return jsonify({"status": "ok"})

    @app.get("/readyz")
    def readyz() -> Response:
        if reasons := models.failures():
            return unwell("failed", "; ".join(reasons))
        statuses = models.statuses()
        if waiting := [f"{name} is {status}" for name, status in statuses.items() if status != "ready"]:
            return unwell("unavailable", ", ".join(waiting))
        return jsonify({"status": "ready"} | ({"models": list(statuses)} if tells_details() else {}))

    @app.get("/metrics")
    def metrics() -> Response:
        check_may_measure()
        text, content_type = context.metrics.render(models.metrics_and_stats())
        return Response(text, content_type=content_type)
