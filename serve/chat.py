"""POST /v1/chat/completions: messages in, the assistant's message out."""

from flask import Blueprint, Response, request

from serve.openai_replies import ChatShape
from serve.openai_requests import read_chat
from serve.replying import Context, check_choices, lease_model, read_json, respond, start


def chat_blueprint(context: Context) -> Blueprint:
    """The route of this module."""
    blueprint = Blueprint("chat", __name__)

    @blueprint.post("/v1/chat/completions")
    def chat() -> Response:
        raw = read_json(request, is_logged=context.settings.log_prompts)
        model = lease_model(context, raw)
        wanted = read_chat(raw, model_name=model.name, tool_format=model.tool_format)
        check_choices(context, 1, wanted.n)
        tools = () if wanted.tool_use is None else wanted.tool_use.tools
        choices = start(context, request, model, wanted, [model.encode_chat(wanted.messages, tools=tools)])
        return respond(choices, ChatShape(model, [tool.name for tool in tools]), wanted)

    return blueprint
