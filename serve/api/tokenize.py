"""POST /tokenize and /detokenize: from text to token ids and back, as in vLLM's server."""

from typing import Any

from flask import Flask, Response, jsonify, request

from runtime.errors import InvalidRequest
from runtime.text_model import TextModel
from serve.api.bodies import read_json
from serve.api.context import Context, errors_name, lease_model, noting_fields
from serve.fields.checks import boolean, integer, list_of, string
from serve.fields.foreign import DETOKENIZE, TOKENIZE, table
from serve.fields.messages import read_messages
from serve.fields.prompt import CHAT_TEMPLATE_FIELDS, chat_options
from serve.fields.reading import Field, read_fields
from serve.fields.tools import tools

MAX_TOKENS = 2**20
"""Longest list of token ids that is read."""
MIN_DETOKENIZED = 2**16
"""Most token ids in a request of /detokenize, if the context is shorter."""
TOKENIZE_FIELDS = table(
    TOKENIZE,
    Field("model", string),
    Field("prompt", string),
    Field("messages", read_messages),
    Field("tools", tools),
    Field("add_special_tokens", boolean),
    Field("return_token_strs", boolean),
    *CHAT_TEMPLATE_FIELDS,
)
DETOKENIZE_FIELDS = table(
    DETOKENIZE,
    Field("model", string),
    Field("tokens", list_of(integer, "token ids", max_len=MAX_TOKENS), is_required=True),
)


def add_tokenize_routes(app: Flask, context: Context) -> None:
    """Add the routes of this module to the application."""

    @app.post("/tokenize")
    def tokenize() -> Response:
        raw = read_json(request)
        model = lease_model(context, raw)
        with noting_fields(context):
            values = read_fields(raw, TOKENIZE_FIELDS)
        ids = _encode(model, values)
        answer = {"count": len(ids), "max_model_len": model.max_len, "tokens": ids}
        if values.get("return_token_strs", False):
            answer["token_strs"] = [model.token_text(token_id) for token_id in ids]
        return jsonify(answer)

    @app.post("/detokenize")
    def detokenize() -> Response:
        raw = read_json(request)
        model = lease_model(context, raw)
        with noting_fields(context):
            ids = read_fields(raw, DETOKENIZE_FIELDS)["tokens"]
        most = max(model.max_len, MIN_DETOKENIZED)
        if len(ids) > most:
            raise InvalidRequest(f"{len(ids):,} token ids are too many; send at most {most:,}", param="tokens")
        if bad := [token_id for token_id in ids if not 0 <= token_id < model.vocab_size]:
            raise InvalidRequest(
                f"token id {bad[0]} is not in the vocabulary, 0 to {model.vocab_size - 1}", param="tokens"
            )
        # Special tokens have no text in an answer; here they are shown.
        pieces = (model.token_bytes(token_id) or model.token_text(token_id).encode() for token_id in ids)
        return jsonify({"prompt": b"".join(pieces).decode("utf-8", "replace")})


def _encode(model: TextModel, values: dict[str, Any]) -> list[int]:
    if ("prompt" in values) == ("messages" in values):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if "prompt" in values:
        return model.encode(values["prompt"], add_special_tokens=values.get("add_special_tokens", True))
    if values.get("add_special_tokens", False):
        raise InvalidRequest("add_special_tokens needs prompt: a chat template adds its own", param="messages")
    with errors_name("messages"):
        return model.encode_chat(values["messages"], tools=values.get("tools", ()), options=chat_options(values))
