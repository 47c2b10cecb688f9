"""GET /v1/models and /v1/models/<id>: what is served."""

from flask import Blueprint, Response, jsonify

from runtime.errors import Unavailable
from serve.api.replying import Context
from serve.model_registry import Generation
from serve.replies.openai import Json, model_object


def models_blueprint(context: Context) -> Blueprint:
    """The routes of this module."""
    blueprint = Blueprint("models", __name__)
    models = context.models

    @blueprint.get("/v1/models")
    def list_models() -> Response:
        loaded = [served.current for served in models.served.values() if served.current is not None]
        aliased = [
            (alias, served.current)
            for alias, name in models.aliases.items()
            if (served := models.served[name]).current is not None
        ]
        return jsonify(
            {
                "object": "list",
                "data": [_described(generation) for generation in loaded]
                + [_described(generation, alias) for alias, generation in aliased if generation is not None],
            }
        )

    @blueprint.get("/v1/models/<path:model_name>")
    def retrieve_model(model_name: str) -> Response:
        served = models.find(model_name)
        if served.current is None:
            raise Unavailable(f"the model {model_name} is still loading; try again later")
        return jsonify(_described(served.current, model_name if model_name in models.aliases else None))

    return blueprint


def _described(generation: Generation, alias: str | None = None) -> Json:
    """OpenAI's model object, and what the artifact says of itself; under an alias, `root` is the model's own name."""
    model = generation.model
    root = {} if alias is None else {"root": model.name}
    return {**model_object(alias or model.name, generation.created, model.max_len), **root, **model.card}
