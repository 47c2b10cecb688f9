"""POST /v1/chat/completions: messages in, the assistant's message out."""

from collections.abc import Sequence

from flask import Flask, Response, request

from runtime.errors import InvalidRequest
from runtime.text.tools.formats import Tool
from runtime.text_model import TextModel
from serve.api.bodies import read_json
from serve.api.context import Context, errors_name, lease_model, noting_fields
from serve.api.replying import check_choices, respond, start
from serve.fields.reading import note_ignored
from serve.fields.requests import ChatRequest, read_chat
from serve.fields.tools import objects_for_text
from serve.replies.openai import ChatShape


def add_chat_route(app: Flask, context: Context) -> None:
    """Add the route of this module to the application."""

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        raw = read_json(request, is_logged=context.settings.log_prompts)
        model = lease_model(context, raw)
        with noting_fields(context):
            wanted = read_chat(raw, tool_format=model.tool_format)
            for name in model.unread_fields(wanted.messages, wanted.chat_options):
                note_ignored(name)
        check_choices(context, 1, wanted.n)
        tools = () if wanted.tool_use is None else wanted.tool_use.tools
        with errors_name("messages"):
            choices = start(context, request, model, wanted, [_prompt(model, wanted, tools)])
        return respond(choices, _shape(model, wanted, tools), wanted)


def _shape(model: TextModel, wanted: ChatRequest, tools: Sequence[Tool]) -> ChatShape:
    return ChatShape(model, [tool.name for tool in tools], may_call_or_answer=wanted.may_call_or_answer)


def _prompt(model: TextModel, wanted: ChatRequest, tools: Sequence[Tool]) -> list[int]:
    """The token ids of the conversation. Call arguments that are not JSON go to the template as text; if the template
    refuses that, as an object around the text."""
    options, most = wanted.chat_options, wanted.max_prompt(model.max_len)
    try:
        prompt_ids = model.encode_chat(wanted.messages, tools=tools, options=options, max_tokens=most)
    except InvalidRequest:
        wrapped = objects_for_text(wanted.messages)
        if wrapped == list(wanted.messages):
            raise
        prompt_ids = model.encode_chat(wrapped, tools=tools, options=options, max_tokens=most)
    return wanted.cut_prompt(prompt_ids, model.max_len)
