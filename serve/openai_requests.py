"""What a client may ask for: the fields of OpenAI's two generation calls, as tables, and what they become.

Knows nothing of HTTP or of generation. A field that is not in a table, or that asks for something this server
does not do, is a 400: a request that is half honoured is worse than one refused. The reference for names and
meanings is https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repetition_penalty`,
`ignore_eos` and `stop_token_ids` are what the field's other servers call these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.core import MAX_LOGPROBS, MAX_STOP_STRINGS, RequestOptions, SamplingParams
from runtime.errors import InvalidRequest, ModelNotFound
from serve.fields import (
    Field,
    MismatchError,
    between,
    boolean,
    check_value,
    integer,
    list_of,
    number,
    one_of,
    read_fields,
    shown,
    string,
    unsupported,
)

MAX_N = 16
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024
MAX_BIASES = 1024
"""Bounds the work the sampler does per token for one request."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat gets what is left of the context."""

ROLES = ("system", "developer", "user", "assistant")
Prompt = str | tuple[int, ...]


def _stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    strings: tuple[str, ...] = list_of(string, "strings", max_len=MAX_STOP_STRINGS)(value)
    if not all(strings):
        raise MismatchError("a string or a list of strings, none of them empty")
    return strings


def _token_ids(value: Any) -> tuple[int, ...]:
    ids: tuple[int, ...] = list_of(integer, "token ids", max_len=2**20)(value)
    return ids


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


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise MismatchError(f"an object of at most {MAX_BIASES} token ids and numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise MismatchError(f"an object whose keys are token ids (found the key {shown(key)})")
        biases[int(key)] = number(bias)
    return biases


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict):
        raise MismatchError("an object")
    options = read_fields(value, (Field("include_usage", boolean),), "stream_options.")
    return bool(options.get("include_usage", False))


def _response_format(value: Any) -> None:
    if not isinstance(value, dict):
        raise MismatchError("an object")
    read_fields(value, (Field("type", one_of("text"), is_required=True),), "response_format.")


CONTENT_PART_FIELDS = (
    Field("type", one_of("text"), is_required=True),
    Field("text", string, is_required=True),
)
NO_TOOLS = "tools are not supported"
MESSAGE_FIELDS = (
    Field("role", one_of(*ROLES), is_required=True),
    Field("content", lambda value: value, is_required=True),
    Field("name", string),
    # What clients send back when they append the reply to the conversation.
    Field("refusal", unsupported("this model does not refuse")),
    Field("annotations", unsupported("annotations are not supported", [])),
    Field("audio", unsupported("text only")),
    Field("function_call", unsupported(NO_TOOLS)),
    Field("tool_calls", unsupported(NO_TOOLS, [])),
)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    """Messages with their content as plain text. `developer` is the newer word for `system`."""
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise MismatchError(f"a list of 1 to {MAX_MESSAGES} messages")
    messages: list[dict[str, str]] = []
    for idx, item in enumerate(value):
        path = f"messages[{idx}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{path} must be an object, got {shown(item)}", param=path)
        message = read_fields(item, MESSAGE_FIELDS, f"{path}.")
        if message["role"] == "developer":
            message["role"] = "system"
        message["content"] = _content(message["content"], f"{path}.content")
        messages.append({name: message[name] for name in ("role", "content", "name") if name in message})
    return tuple(messages)


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
    Field("model", string, is_required=True),
    Field("n", between(1, MAX_N)),
    Field("stream", boolean),
    Field("stream_options", _stream_options),
    Field("max_tokens", between(1, 2**31)),
    Field("user", string),
    Field("cache_salt", string),
    Field("priority", integer),
    Field("timeout", number),
)
COMPLETION_FIELDS = (
    *COMMON_FIELDS,
    *SAMPLING_FIELDS,
    Field("prompt", _prompts, is_required=True),
    Field("logprobs", between(0, MAX_LOGPROBS)),
    Field("echo", boolean),
    Field("best_of", between(1, MAX_N)),
    Field("suffix", unsupported("filling in the middle is not supported", "")),
)
CHAT_FIELDS = (
    *COMMON_FIELDS,
    *SAMPLING_FIELDS,
    Field("messages", _messages, is_required=True),
    Field("max_completion_tokens", between(1, 2**31)),
    Field("logprobs", boolean),
    Field("top_logprobs", between(0, MAX_LOGPROBS)),
    Field("response_format", _response_format),
    Field("modalities", unsupported("text only", ["text"])),
    Field("tools", unsupported(NO_TOOLS, [])),
    Field("tool_choice", unsupported(NO_TOOLS, "none", "auto")),
    Field("parallel_tool_calls", boolean),
    Field("functions", unsupported(NO_TOOLS, [])),
    Field("function_call", unsupported(NO_TOOLS, "none", "auto")),
    Field("store", unsupported("nothing is stored", False)),
    Field("service_tier", unsupported("there is one tier", "auto", "default")),
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
    options: RequestOptions

    def for_choice(self, choice_idx: int, prompt_len: int, max_len: int) -> SamplingParams:
        """Parameters of one choice of a prompt of `prompt_len` tokens.

        Choice k is sampled with seed + k: the choices differ, and the first is what n=1 would give.
        """
        # If the prompt fills the context, ask for one token all the same: the engine names both lengths.
        max_tokens = self.max_tokens or max(1, max_len - prompt_len)
        seed = self.params.seed
        if seed is not None and choice_idx:
            seed = (seed + choice_idx) % 2**63
        return replace(self.params, max_tokens=max_tokens, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompts: tuple[Prompt, ...]
    is_echo: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: tuple[Mapping[str, str], ...]


def read_completion(raw: Mapping[str, Any], *, model_name: str) -> CompletionRequest:
    """Check a completion request. Raises InvalidRequest or ModelNotFound."""
    values = read_fields(raw, COMPLETION_FIELDS)
    common = _common(values, values.get("logprobs"), model_name=model_name)
    is_echo = values.get("echo", False)
    if is_echo and "logprobs" in values:
        raise InvalidRequest(
            "echo with logprobs is not supported: prompts have no log-probabilities here", param="echo"
        )
    best_of = values.get("best_of", common["n"])
    if best_of != common["n"]:
        raise InvalidRequest(f"best_of must be absent or equal n ({common['n']}), got {best_of}", param="best_of")
    if common["max_tokens"] is None:
        common["max_tokens"] = DEFAULT_COMPLETION_TOKENS
    return CompletionRequest(prompts=values["prompt"], is_echo=is_echo, **common)


def read_chat(raw: Mapping[str, Any], *, model_name: str) -> ChatRequest:
    """Check a chat request. Raises InvalidRequest or ModelNotFound."""
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
    return ChatRequest(messages=values["messages"], **common)


def _common(values: Mapping[str, Any], logprobs: int | None, *, model_name: str) -> dict[str, Any]:
    if values["model"] != model_name:
        raise ModelNotFound(
            f"this server has no model {shown(values['model'])}; it serves {shown(model_name)}", param="model"
        )
    if "stream_options" in values and not values.get("stream", False):
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    sampling = {name: value for name, value in values.items() if name in SAMPLING_NAMES}
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = frozenset(sampling["stop_token_ids"])
    return {
        "model": values["model"],
        "params": SamplingParams(logprobs=logprobs, **sampling),
        "max_tokens": values.get("max_tokens"),
        "n": values.get("n", 1),
        "is_stream": values.get("stream", False),
        "include_usage": values.get("stream_options", False),
        "options": RequestOptions(
            cache_salt=values.get("cache_salt", ""),
            priority=values.get("priority", 0),
            timeout_s=values.get("timeout"),
        ),
    }
