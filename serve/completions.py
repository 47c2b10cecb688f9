"""POST /v1/completions: text or token ids in, text out."""

from flask import Blueprint, Response, request

from runtime.text_model import TextModel
from serve.openai_replies import CompletionShape
from serve.openai_requests import CompletionRequest, read_completion
from serve.replying import Context, lease_model, read_json, respond, start


def completions_blueprint(context: Context) -> Blueprint:
    """The route of this module."""
    blueprint = Blueprint("completions", __name__)

    @blueprint.post("/v1/completions")
    def complete() -> Response:
        raw = read_json(request, is_logged=context.settings.log_prompts)
        model = lease_model(context, raw)
        wanted = read_completion(raw, model_name=model.name)
        prompts = [model.encode(item) if isinstance(item, str) else list(item) for item in wanted.prompts]
        choices = start(context, request, model, wanted, prompts)
        shape = CompletionShape(model, _echo(model, wanted) if wanted.is_echo else ())
        return respond(choices, shape, wanted)

    return blueprint


def _echo(model: TextModel, wanted: CompletionRequest) -> list[str]:
    """The prompt's text once per choice; token ids are spelled out."""
    texts = []
    for prompt in wanted.prompts:
        if isinstance(prompt, str):
            text = prompt
        else:
            text = b"".join(map(model.token_bytes, prompt)).decode("utf-8", "replace")
        texts += [text] * wanted.n
    return texts
