"""What a client may ask for: the fields of OpenAI's two generation calls, as tables, and what they become.

Knows nothing of HTTP or of generation. The rows here are the honoured fields; those taken without effect and those
refused are in serve/field_classes.py. The reference for names and meanings is
https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`stop_token_ids` are what the field's other servers call these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.core import MAX_LOGPROBS, MAX_PRIORITY, MAX_STOP_STRINGS, RequestOptions, SamplingParams
from runtime.errors import InvalidRequest, ModelNotFound
from runtime.tool_formats import GENERIC, ToolFormat
from serve.field_classes import CHAT, COMPLETION, MESSAGE, PART, REQUEST, STREAM_OPTIONS, table
from serve.fields import (
    Field,
    MismatchError,
    between,
    boolean,
    check_value,
    described,
    integer,
    list_of,
    number,
    one_of,
    read_fields,
    shown,
    string,
    table_schema,
)
from serve.output_format import OUTPUT_FIELDS, wanted_form
from serve.tool_fields import TOOL_USE_FIELDS, ToolUse, any_calls, read_call_id, read_calls, wanted_tools

MAX_N = 16
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_BIASES = 1024
"""Bounds the work the sampler does per token for one request."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat gets what is left of the context."""

ROLES = ("system", "developer", "user", "assistant", "tool")
Prompt = str | tuple[int, ...]


TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}


@described(anyOf=[TEXT, {"type": "array", "items": TEXT, "maxItems": MAX_STOP_STRINGS}])
def _stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    strings: tuple[str, ...] = list_of(string, "strings", max_len=MAX_STOP_STRINGS)(value)
    if not all(strings):
        raise MismatchError("a string or a list of strings, none of them empty")
    return strings


@described(**TOKEN_IDS)
def _token_ids(value: Any) -> tuple[int, ...]:
    ids: tuple[int, ...] = list_of(integer, "token ids", max_len=2**20)(value)
    return ids


def _many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_PROMPTS}


@described(anyOf=[TEXT, _many(TEXT), TOKEN_IDS, _many(TOKEN_IDS)])
def _prompts(value: Any) -> tuple[Prompt, ...]:
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


@described(
    type="object",
    description="Token ids, as text, and what is added to their logits.",
    propertyNames={"pattern": "^[0-9]{1,9}$"},
    additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    maxProperties=MAX_BIASES,
)
def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise MismatchError(f"an object of at most {MAX_BIASES} token ids and numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise MismatchError(f"an object whose keys are token ids (found the key {shown(key)})")
        biases[int(key)] = number(bias)
    return biases


STREAM_OPTIONS_FIELDS = table(STREAM_OPTIONS, Field("include_usage", boolean), Field("continuous_usage_stats", boolean))
"""The second is vLLM's, which load generators ask for: the usage so far in every chunk."""


@described(**table_schema(STREAM_OPTIONS_FIELDS))
def _stream_options(value: Any) -> frozenset[str]:
    """The options that are true."""
    if not isinstance(value, dict):
        raise MismatchError("an object")
    options = read_fields(value, STREAM_OPTIONS_FIELDS, "stream_options.")
    return frozenset(name for name, is_on in options.items() if is_on)


CONTENT_PART_FIELDS = table(
    PART,
    Field("type", one_of("text"), is_required=True),
    Field("text", string, is_required=True),
)
CONTENT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": table_schema(CONTENT_PART_FIELDS), "minItems": 1}]
}


@described(**CONTENT)
def _any_content(value: Any) -> Any:
    """Checked later, where the index of the message is known."""
    return value


MESSAGE_FIELDS = table(
    MESSAGE,
    Field("role", one_of(*ROLES), is_required=True),
    Field("content", _any_content),
    Field("name", string),
    Field("tool_calls", any_calls),
    Field("tool_call_id", string),
)


@described(type="array", items=table_schema(MESSAGE_FIELDS), minItems=1, maxItems=MAX_MESSAGES)
def read_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Messages with their content as plain text. `developer` is the newer word for `system`."""
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise MismatchError(f"a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for idx, item in enumerate(value):
        path = f"messages[{idx}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{path} must be an object, got {shown(item)}", param=path)
        messages.append(_message(read_fields(item, MESSAGE_FIELDS, f"{path}."), f"{path}."))
    return tuple(messages)


def _message(found: dict[str, Any], path: str) -> dict[str, Any]:
    """One message as chat templates take it: role, content, and name, tool_calls or tool_call_id where it has them."""
    role = found["role"]
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = read_calls(found.get("tool_calls", []), f"{path}tool_calls")
    if calls and role != "assistant":
        raise InvalidRequest(f"{path}tool_calls belong to the role assistant, not {role}", param=f"{path}tool_calls")
    if "content" not in found and not calls:
        raise InvalidRequest(f"{path}content is required", param=f"{path}content")
    message["content"] = _content(found["content"], f"{path}content") if "content" in found else ""
    if "name" in found:
        message["name"] = found["name"]
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message["tool_call_id"] = read_call_id(found.get("tool_call_id"), f"{path}tool_call_id")
    return message


def _content(value: Any, path: str) -> str:
    """A string, or content parts of type text, joined by newlines."""
    if not isinstance(value, list):
        return str(check_value(value, string, path))
    if not value:
        raise InvalidRequest(f"{path} must not be an empty list", param=path)
    texts = []
    for idx, part in enumerate(value):
        if not isinstance(part, dict):
            raise InvalidRequest(f"{path}[{idx}] must be an object, got {shown(part)}", param=path)
        texts.append(read_fields(part, CONTENT_PART_FIELDS, f"{path}[{idx}].")["text"])
    return "\n".join(texts)


@described(type="number", exclusiveMinimum=0)
def _timeout(value: Any) -> float:
    return float(number(value))  # RequestOptions checks the bound


# Ranges are not repeated here: SamplingParams checks them.
SAMPLING_FIELDS = (
    Field("temperature", number),
    Field("top_p", number),
    Field("top_k", integer),
    Field("min_p", number),
    Field("repetition_penalty", number),
    Field("presence_penalty", number),
    Field("frequency_penalty", number),
    Field("logit_bias", _logit_bias),
    Field("seed", integer),
    Field("stop", _stop),
    Field("stop_token_ids", list_of(integer, "token ids", max_len=MAX_BIASES)),
    Field("ignore_eos", boolean),
)
SAMPLING_NAMES = frozenset(field.name for field in SAMPLING_FIELDS)
COMMON_FIELDS = (
    *OUTPUT_FIELDS,
    Field("model", string, is_required=True),
    Field("n", between(1, MAX_N)),
    Field("stream", boolean),
    Field("stream_options", _stream_options),
    Field("cache_salt", string),
    Field("priority", between(-MAX_PRIORITY, MAX_PRIORITY)),
    Field("timeout", _timeout),
)
COMPLETION_FIELDS = table(
    COMPLETION,
    *COMMON_FIELDS,
    Field("max_tokens", between(0, 2**31)),
    *SAMPLING_FIELDS,
    Field("prompt", _prompts, is_required=True),
    Field("logprobs", between(0, MAX_LOGPROBS)),
    Field("echo", boolean),
    Field("best_of", between(1, MAX_N)),
    also=REQUEST,
)
CHAT_FIELDS = table(
    CHAT,
    *COMMON_FIELDS,
    Field("max_tokens", between(1, 2**31)),
    *SAMPLING_FIELDS,
    Field("messages", read_messages, is_required=True),
    Field("max_completion_tokens", between(1, 2**31)),
    Field("logprobs", boolean),
    Field("top_logprobs", between(0, MAX_LOGPROBS)),
    *TOOL_USE_FIELDS,
    also=REQUEST,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What both calls share. `params.max_tokens` means nothing until `for_choice` has set it."""

    model: str
    params: SamplingParams
    max_tokens: int | None
    """None: what is left of the context after the prompt."""
    n: int
    is_stream: bool
    include_usage: bool
    has_running_usage: bool
    """Whether every chunk has the usage so far."""
    options: RequestOptions

    def for_choice(self, choice_idx: int, prompt_len: int, max_len: int) -> SamplingParams:
        """Parameters of one choice of a prompt of `prompt_len` tokens.

        Choice k is sampled with seed + k: the choices differ, and the first is what n=1 would give.
        """
        # If the prompt fills the context, ask for one token all the same: the engine names both lengths.
        max_tokens = max(1, max_len - prompt_len) if self.max_tokens is None else self.max_tokens
        seed = self.params.seed
        if seed is not None and choice_idx:
            seed = (seed + choice_idx) % 2**63
        return replace(self.params, max_tokens=max_tokens, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompts: tuple[Prompt, ...]
    is_echo: bool

    @property
    def is_scored(self) -> bool:
        """Whether the prompt is repeated with its log-probabilities."""
        return self.is_echo and self.params.logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: tuple[Mapping[str, Any], ...]
    tool_use: ToolUse | None


def read_completion(raw: Mapping[str, Any], *, model_name: str) -> CompletionRequest:
    """Check a completion request. Raises InvalidRequest or ModelNotFound."""
    values = read_fields(raw, COMPLETION_FIELDS)
    common = _common(values, values.get("logprobs"), model_name=model_name)
    is_echo = values.get("echo", False)
    if values.get("max_tokens") == 0 and not is_echo:
        raise InvalidRequest("max_tokens must be at least 1, unless echo is true", param="max_tokens")
    if is_echo and ("logprobs" in values or values.get("max_tokens") == 0):
        common["params"] = replace(common["params"], prompt_logprobs=values.get("logprobs", 0))
    best_of = values.get("best_of", common["n"])
    if best_of != common["n"]:
        raise InvalidRequest(f"best_of must be absent or equal n ({common['n']}), got {best_of}", param="best_of")
    if common["max_tokens"] is None:
        common["max_tokens"] = DEFAULT_COMPLETION_TOKENS
    return CompletionRequest(prompts=values["prompt"], is_echo=is_echo, **common)


def read_chat(raw: Mapping[str, Any], *, model_name: str, tool_format: ToolFormat = GENERIC) -> ChatRequest:
    """Check a chat request for a model that writes calls in `tool_format`. Raises InvalidRequest or ModelNotFound."""
    values = read_fields(raw, CHAT_FIELDS)
    wants_logprobs = values.get("logprobs", False)
    if "top_logprobs" in values and not wants_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = values.get("top_logprobs", 0) if wants_logprobs else None
    common = _common(values, logprobs, model_name=model_name)
    newer = values.get("max_completion_tokens")
    if newer is not None and common["max_tokens"] not in (None, newer):
        raise InvalidRequest(
            f"max_tokens ({common['max_tokens']}) and max_completion_tokens ({newer}) differ; give one",
            param="max_completion_tokens",
        )
    common["max_tokens"] = newer or common["max_tokens"]
    tool_use = wanted_tools(values)
    if tool_use is not None:
        if common["params"].constraint is not None:
            raise InvalidRequest(
                "tools and a form of the answer exclude each other, unless tool_choice is none", param="tools"
            )
        common["params"] = replace(common["params"], constraint=tool_use.constraint(tool_format))
    return ChatRequest(messages=values["messages"], tool_use=tool_use, **common)


def _common(values: Mapping[str, Any], logprobs: int | None, *, model_name: str) -> dict[str, Any]:
    if values["model"] != model_name:
        raise ModelNotFound(
            f"this server has no model {shown(values['model'])}; it serves {shown(model_name)}", param="model"
        )
    if "stream_options" in values and not values.get("stream", False):
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    options = values.get("stream_options", frozenset())
    sampling = {name: value for name, value in values.items() if name in SAMPLING_NAMES}
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = frozenset(sampling["stop_token_ids"])
    return {
        "model": values["model"],
        "params": SamplingParams(logprobs=logprobs, constraint=wanted_form(values), **sampling),
        "max_tokens": values.get("max_tokens"),
        "n": values.get("n", 1),
        "is_stream": values.get("stream", False),
        "include_usage": "include_usage" in options,
        "has_running_usage": {"include_usage", "continuous_usage_stats"} <= options,
        "options": RequestOptions(
            cache_salt=values.get("cache_salt", ""),
            priority=values.get("priority", 0),
            timeout_s=values.get("timeout"),
        ),
    }
