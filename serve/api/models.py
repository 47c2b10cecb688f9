"""GET /v1/models and /v1/models/<id>: the models that are served."""

from flask import Flask, Response, jsonify

from runtime.errors import Unavailable
from serve.api.context import Context
from serve.model_registry import LoadedModel
from serve.replies.openai import Json, model_object


def add_models_routes(app: Flask, context: Context) -> None:
    """Add the routes of this module to the application."""
    models = context.models

    @app.get("/v1/models")
    def list_models() -> Response:
        names = [(name, None) for name in models.served] + [(name, alias) for alias, name in models.aliases.items()]
        found = [(models.served[name].current, alias) for name, alias in names]
        data = [_described(loaded, alias) for loaded, alias in found if loaded is not None]
        return jsonify({"object": "list", "data": data})

    @app.get("/v1/models/<path:model_name>")
    def retrieve_model(model_name: str) -> Response:
        served = models.find(model_name)
        if served.current is None:
            raise Unavailable(f"the model {model_name} is still loading; try again later")
        return jsonify(_described(served.current, model_name if model_name in models.aliases else None))


def _described(loaded: LoadedModel, alias: str | None = None) -> Json:
    """OpenAI's model object with the artifact's own data. Under an alias, `root` is the model's own name."""
    model = loaded.model
    root = {} if alias is None else {"root": model.name}
    return {**model_object(alias or model.name, loaded.created, model.max_len), **root, **model.card}
