"""GET /status: what is running now, for people; the page at / draws it. Shows counts and times, no part of any prompt.

With API keys, each key sees its own requests and the part of the KV cache they use. A key that may read the metrics
sees the use of the whole cache.
"""

import time
from collections import Counter
from collections.abc import Iterable

from flask import Flask, Response, jsonify

from serve.access.middleware import current_record, may_measure
from serve.access.record import RequestRecord
from serve.api.context import Context
from serve.model_registry import ServedModel
from serve.replies.openai import Json


def add_status_route(app: Flask, context: Context) -> None:
    """Add the route of this module to the application."""

    @app.get("/status")
    def status() -> Response:
        asking = current_record()
        own = [record for record in context.access.live.records() if record.tenant == asking.tenant]
        own_tokens = None if may_measure() else _tokens_by_model(own)
        return jsonify(
            {
                "time": time.time(),
                "models": [_model_status(served, own_tokens) for served in context.models.served.values()],
                "requests": [_request_status(record) for record in own],
            }
        )


def _tokens_by_model(records: Iterable[RequestRecord]) -> Counter[str]:
    """Tokens of prompts and answers so far, by model."""
    tokens: Counter[str] = Counter()
    for record in records:
        if record.choices is not None and record.model is not None:
            tokens[record.model] += record.choices.num_prompt_tokens + record.choices.num_generated_tokens
    return tokens


def _model_status(served: ServedModel, own_tokens: Counter[str] | None) -> Json:
    stats = served.model.stats() if served.model is not None else None
    used_tokens = stats.kv_used_tokens if stats else 0
    return {
        "name": served.name,
        "status": served.status,
        "running": stats.num_running if stats else 0,
        "waiting": stats.num_waiting if stats else 0,
        "slots": stats.num_slots if stats else 0,
        "kv_tokens_used": used_tokens if own_tokens is None else own_tokens[served.name],
        "kv_tokens": stats.kv_total_tokens if stats else 0,
    }


def _request_status(record: RequestRecord) -> Json:
    assert record.choices is not None  # a request becomes live when it has choices
    return {
        "request_id": record.request_id,
        "model": record.model,
        "route": record.route,
        "seconds": round(record.seconds, 3),
        "first_token_seconds": None if record.first_token_s is None else round(record.first_token_s, 3),
        "choices": len(record.choices),
        "prompt_tokens": record.choices.num_prompt_tokens,
        "completion_tokens": record.choices.num_generated_tokens,
    }
