"""POST /v1/chat/completions: messages in, the assistant's message out."""

from collections.abc import Sequence

from flask import Blueprint, Response, request

from runtime.errors import InvalidRequest
from runtime.text.tools.formats import Tool
from runtime.text_model import TextModel
from serve.api.replying import Context, blaming, check_choices, lease_model, noted, read_json, respond, start
from serve.fields.reading import note_ignored
from serve.fields.requests import ChatRequest, read_chat
from serve.fields.tools import objects_for_text
from serve.replies.openai import ChatShape


def chat_blueprint(context: Context) -> Blueprint:
    """The route of this module."""
    blueprint = Blueprint("chat", __name__)

    @blueprint.post("/v1/chat/completions")
    def chat() -> Response:
        raw = read_json(request, is_logged=context.settings.log_prompts)
        model = lease_model(context, raw)
        with noted(context):
            wanted = read_chat(raw, tool_format=model.tool_format)
            for name in model.unread_fields(wanted.messages, wanted.chat_options):
                note_ignored(name)
        check_choices(context, 1, wanted.n)
        tools = () if wanted.tool_use is None else wanted.tool_use.tools
        with blaming("messages"):
            choices = start(context, request, model, wanted, [_prompt(model, wanted, tools)])
        return respond(choices, _shape(model, wanted, tools), wanted)

    return blueprint


def _shape(model: TextModel, wanted: ChatRequest, tools: Sequence[Tool]) -> ChatShape:
    return ChatShape(model, [tool.name for tool in tools], may_call_or_answer=wanted.may_call_or_answer)


def _prompt(model: TextModel, wanted: ChatRequest, tools: Sequence[Tool]) -> list[int]:
    """The token ids of the conversation. Arguments that are no JSON go to the template as text, which some templates
    do not take; then as objects that hold it."""
    options, most = wanted.chat_options, wanted.max_prompt(model.max_len)
    try:
        prompt_ids = model.encode_chat(wanted.messages, tools=tools, options=options, max_tokens=most)
    except InvalidRequest:
        wrapped = objects_for_text(wanted.messages)
        if wrapped == list(wanted.messages):
            raise
        prompt_ids = model.encode_chat(wrapped, tools=tools, options=options, max_tokens=most)
    return wanted.cut_prompt(prompt_ids, model.max_len)
