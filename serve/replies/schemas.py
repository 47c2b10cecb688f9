"""JSON schemas of the server's replies. tests/http/test_openapi.py checks every reply against them."""

from typing import Any

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
COUNT: Json = {"type": "integer", "minimum": 0}
NUMBER: Json = {"type": "number"}
FINISH: Json = {"type": ["string", "null"]}


def record(**properties: Json) -> Json:
    """An object that has all of these properties. Later releases may add some."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def array(items: Json) -> Json:
    return {"type": "array", "items": items}


def optional(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def choice(**properties: Json) -> Json:
    """A choice, perhaps with a `schema_check`."""
    described = record(index=COUNT, finish_reason=FINISH, **properties)
    check = record(outcome={"enum": ["passed", "failed", "not_done"]}, problems=array(TEXT))
    return described | {"properties": described["properties"] | {"schema_check": check}}


def reply(kind: str, item: Json, *, is_chunk: bool = False) -> Json:
    """A reply with its choices. A chunk need not have the usage."""
    usage = {} if is_chunk else {"usage": ref("Usage")}
    return record(id=TEXT, object={"const": kind}, created=COUNT, model=TEXT, choices=array(item), **usage)


TOKEN_LOGPROB = record(token=TEXT, logprob=NUMBER, bytes=optional(array({"type": "integer", "minimum": 0})))
CHAT_LOGPROBS = optional(
    record(content=array(record(top_logprobs=array(TOKEN_LOGPROB), **TOKEN_LOGPROB["properties"])))
)
COMPLETION_LOGPROBS = optional(
    record(
        tokens=array(TEXT),
        token_logprobs=array({"type": ["number", "null"]}),
        top_logprobs=array(optional({"type": "object", "additionalProperties": NUMBER})),
        text_offset=array(COUNT),
    )
)
MESSAGE = record(role={"const": "assistant"}, content={"type": ["string", "null"]})

REPLIES: dict[str, Json] = {
    "Error": record(
        error=record(
            message=TEXT,
            type=TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        )
    ),
    "Usage": record(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=record(cached_tokens=COUNT),
        completion_tokens_details=record(accepted_prediction_tokens=COUNT, rejected_prediction_tokens=COUNT),
    ),
    "Completion": reply("text_completion", choice(text=TEXT, logprobs=COMPLETION_LOGPROBS)),
    "CompletionChunk": reply("text_completion", choice(text=TEXT, logprobs=COMPLETION_LOGPROBS), is_chunk=True),
    "ChatCompletion": reply("chat.completion", choice(message=MESSAGE, logprobs=CHAT_LOGPROBS)),
    "ChatCompletionChunk": reply(
        "chat.completion.chunk", choice(delta={"type": "object"}, logprobs=CHAT_LOGPROBS), is_chunk=True
    ),
    "Model": record(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT),
    "Models": record(object={"const": "list"}, data=array(ref("Model"))),
    "Tokens": record(count=COUNT, max_model_len=COUNT, tokens=array(COUNT)),
    "Text": record(prompt=TEXT),
    "Healthy": record(status={"enum": ["ok"]}),
    # If the server has keys, the names of models are only for requests with a key.
    "Ready": {**record(status={"enum": ["ready"]}, models=array(TEXT)), "required": ["status"]},
    "Unwell": record(status={"enum": ["failed", "unavailable"]}, reason=TEXT),
    "Status": record(
        time=NUMBER,
        models=array(
            record(
                name=TEXT,
                status={"enum": ["loading", "ready", "failed", "draining"]},
                running=COUNT,
                waiting=COUNT,
                slots=COUNT,
                kv_tokens_used=COUNT,
                kv_tokens=COUNT,
            )
        ),
        requests=array(
            record(
                request_id=TEXT,
                model=TEXT,
                route=TEXT,
                seconds=NUMBER,
                first_token_seconds={"type": ["number", "null"]},
                choices=COUNT,
                prompt_tokens=COUNT,
                completion_tokens=COUNT,
            )
        ),
    ),
}
