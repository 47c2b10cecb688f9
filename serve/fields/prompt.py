"""The fields that say how the prompt is made from messages or texts, and which answer the client expects.

Names and meanings are those of vLLM and transformers; `reasoning_effort` and `prediction` are OpenAI's. Knows nothing
of HTTP or of templates.
"""

from collections.abc import Mapping
from typing import Any

from runtime.text.chat.options import MAX_VARIABLES, ChatOptions
from serve.fields.checks import (
    Json,
    MismatchError,
    any_object,
    boolean,
    check_utf8,
    described,
    integer,
    list_of,
    one_of,
    string,
    text_up_to,
)
from serve.fields.reading import Field, at_path, check_value, fields_of, object_of, table_schema

MAX_EFFORT_CHARS = 32
MAX_PROMPTS = 1024
MAX_PARTS = 1024
WHAT_FITS = -1

Prompt = str | tuple[int, ...]
TOKEN_IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXT: Json = {"type": "string", "minLength": 1}


@described(**TOKEN_IDS)
def _token_ids(value: Any) -> tuple[int, ...]:
    ids: tuple[int, ...] = list_of(integer, "token ids", max_len=2**20)(value)
    return ids


def _many(items: Json) -> Json:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_PROMPTS}


@described(anyOf=[TEXT, _many(TEXT), TOKEN_IDS, _many(TOKEN_IDS)])
def prompts(value: Any) -> tuple[Prompt, ...]:
    """The four forms of OpenAI's `prompt`, as a tuple of texts or of tuples of token ids."""
    if isinstance(value, str):
        return (string(value),)
    if not isinstance(value, list) or not value:
        raise MismatchError("a string, a list of strings, a list of token ids or a list of such lists; none empty")
    if isinstance(value[0], int):
        return (_token_ids(value),)
    if isinstance(value[0], list):
        return tuple(list_of(_token_ids, "lists of token ids", max_len=MAX_PROMPTS)(value))
    return tuple(list_of(string, "strings", max_len=MAX_PROMPTS)(value))


@described(type="object", maxProperties=MAX_VARIABLES, description="Variables of the model's chat template.")
def _variables(value: Any) -> Json:
    check_utf8(any_object(value))
    return dict(value)


CHAT_TEMPLATE_FIELDS = (
    Field("add_generation_prompt", boolean),
    Field("continue_final_message", boolean),
    Field("chat_template_kwargs", _variables),
    Field("enable_thinking", boolean),
    # Any word: the chat template knows which of them mean something.
    Field("reasoning_effort", text_up_to(MAX_EFFORT_CHARS)),
)


def chat_options(values: Mapping[str, Any]) -> ChatOptions:
    """The options of the chat template, from a chat's checked fields. Raises InvalidRequest if two contradict."""
    is_continued = values.get("continue_final_message", False)
    return ChatOptions(
        add_generation_prompt=values.get("add_generation_prompt", not is_continued),
        continue_final_message=is_continued,
        enable_thinking=values.get("enable_thinking"),
        reasoning_effort=values.get("reasoning_effort"),
        variables=values.get("chat_template_kwargs", {}),
    )


@described(
    anyOf=[{"type": "integer", "minimum": 1, "maximum": 2**31}, {"enum": [WHAT_FITS]}],
    description="Keep this many tokens at the end of the prompt; -1: as many as fit beside the answer.",
)
def kept_tokens(value: Any) -> int:
    """vLLM's `truncate_prompt_tokens`."""
    found = int(integer(value))
    if found != WHAT_FITS and not 1 <= found <= 2**31:
        raise MismatchError(f"{WHAT_FITS}, or at least 1 and at most {2**31}")
    return found


PART_FIELDS = (Field("type", one_of("text")), Field("text", string, is_required=True))
_part = fields_of(PART_FIELDS)
_parts = list_of(any_object, "parts", max_len=MAX_PARTS)


@at_path(anyOf=[{"type": "string"}, {"type": "array", "items": table_schema(PART_FIELDS), "maxItems": MAX_PARTS}])
def _predicted(value: Any, path: str) -> str:
    if isinstance(value, str):
        return str(string(value))
    return "".join(check_value(part, _part, f"{path}[{idx}]")["text"] for idx, part in enumerate(_parts(value)))


PREDICTION_FIELDS = (
    Field("type", one_of("content"), is_required=True),
    Field("content", _predicted, is_required=True),
)


@object_of(PREDICTION_FIELDS, description="The answer that the client expects: a draft for --speculate.")
def prediction(found: Json, _: str) -> str:
    """OpenAI's predicted outputs, as text."""
    return str(found["content"])
