"""GET /v1/models and /v1/models/<id>: the one model that is served."""

from flask import Blueprint, Response, jsonify

from runtime.errors import ModelNotFound
from serve.fields import shown
from serve.openai_replies import model_object
from serve.replying import Context


def models_blueprint(context: Context) -> Blueprint:
    """The routes of this module."""
    blueprint = Blueprint("models", __name__)
    model = context.model
    served = model_object(model.name, context.created, model.max_len)

    @blueprint.get("/v1/models")
    def list_models() -> Response:
        return jsonify({"object": "list", "data": [served]})

    @blueprint.get("/v1/models/<path:model_name>")
    def retrieve_model(model_name: str) -> Response:
        if model_name != model.name:
            raise ModelNotFound(
                f"this server has no model {shown(model_name)}; it serves {shown(model.name)}", param="model"
            )
        return jsonify(served)

    return blueprint
