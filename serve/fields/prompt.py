"""The fields that say how a prompt is made, beside the messages or texts it is made of, and what is expected to follow.

Names and meanings are vLLM's and transformers', and OpenAI's for `reasoning_effort` and `prediction`. Knows nothing of
HTTP or of templates.
"""

from collections.abc import Mapping
from typing import Any

from runtime.text.chat.options import MAX_VARIABLES, ChatOptions
from serve.fields.tables import (
    Field,
    MismatchError,
    any_object,
    boolean,
    check_utf8,
    described,
    integer,
    list_of,
    one_of,
    read_fields,
    string,
    table_schema,
)

MAX_EFFORT_CHARS = 32
MAX_PROMPTS = 1024
MAX_PARTS = 1024
WHAT_FITS = -1

Prompt = str | tuple[int, ...]
TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}


@described(**TOKEN_IDS)
def _token_ids(value: Any) -> tuple[int, ...]:
    ids: tuple[int, ...] = list_of(integer, "token ids", max_len=2**20)(value)
    return ids


def _many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_PROMPTS}


@described(anyOf=[TEXT, _many(TEXT), TOKEN_IDS, _many(TOKEN_IDS)])
def prompts(value: Any) -> tuple[Prompt, ...]:
    """The four forms of OpenAI's `prompt`, as a tuple of texts or of token id tuples."""
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
def _variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MismatchError("an object")
    check_utf8(value)
    return value


@described(type="string", minLength=1, maxLength=MAX_EFFORT_CHARS, description="Such as none, low, medium or high.")
def _effort(value: Any) -> str:
    """Any word: which of them mean something is the template's to say."""
    if not 0 < len(string(value)) <= MAX_EFFORT_CHARS:
        raise MismatchError(f"a word of at most {MAX_EFFORT_CHARS} characters")
    return str(value)


CHAT_TEMPLATE_FIELDS = (
    Field("add_generation_prompt", boolean),
    Field("continue_final_message", boolean),
    Field("chat_template_kwargs", _variables),
    Field("enable_thinking", boolean),
    Field("reasoning_effort", _effort),
)


def chat_options(values: Mapping[str, Any]) -> ChatOptions:
    """What the checked fields of a chat say to its template. InvalidRequest for fields that exclude each other."""
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
    description="Keep so many tokens at the end of the prompt; -1: as many as fit beside the answer.",
)
def kept_tokens(value: Any) -> int:
    """vLLM's `truncate_prompt_tokens`."""
    found = int(integer(value))
    if found != WHAT_FITS and not 1 <= found <= 2**31:
        raise MismatchError(f"{WHAT_FITS}, or at least 1 and at most {2**31}")
    return found


PART_FIELDS = (Field("type", one_of("text")), Field("text", string, is_required=True))
_parts = list_of(any_object, "parts", max_len=MAX_PARTS)


@described(anyOf=[{"type": "string"}, {"type": "array", "items": table_schema(PART_FIELDS), "maxItems": MAX_PARTS}])
def _predicted(value: Any) -> str:
    if isinstance(value, str):
        return str(string(value))
    parts = (read_fields(part, PART_FIELDS, f"prediction.content[{idx}].") for idx, part in enumerate(_parts(value)))
    return "".join(part["text"] for part in parts)


PREDICTION_FIELDS = (
    Field("type", one_of("content"), is_required=True),
    Field("content", _predicted, is_required=True),
)


@described(**table_schema(PREDICTION_FIELDS), description="What the answer is expected to be: a draft for --speculate.")
def prediction(value: Any) -> str:
    """OpenAI's predicted outputs, as text."""
    return str(read_fields(any_object(value), PREDICTION_FIELDS, "prediction.")["content"])
