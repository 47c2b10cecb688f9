"""What a client may ask for: the fields of OpenAI's two generation calls, as tables, and what they become.

Knows nothing of HTTP or of generation. The rows here are the honoured fields; those taken without effect and those
refused are in serve/field_classes.py. The reference for names and meanings is
https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`stop_token_ids` are what the field's other servers call these.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.core import MAX_LOGPROBS, MAX_PRIORITY, MAX_STOP_STRINGS, RequestOptions, SamplingParams
from runtime.errors import InvalidRequest, UnsupportedField
from runtime.tool_formats import GENERIC, ToolFormat
from serve.field_classes import CHAT, COMPLETION, REQUEST, STREAM_OPTIONS, table
from serve.fields import (
    INT_BOUND,
    Check,
    Field,
    MismatchError,
    any_object,
    between,
    boolean,
    described,
    integer,
    list_of,
    note_ignored,
    number,
    read_fields,
    shown,
    string,
    table_schema,
)
from serve.message_fields import read_messages
from serve.output_format import OUTPUT_FIELDS, wanted_form
from serve.tool_fields import TOOL_USE_FIELDS, ToolUse, wanted_tools

MAX_N = 16
MAX_PROMPTS = 1024
MAX_LIMIT = 2**31
NO_LIMIT = (-1, -2)
ANY_SEED = -1
MAX_BIASES = 1024
"""Bounds the work the sampler does per token for one request."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat gets what is left of the context."""

Prompt = str | tuple[int, ...]


TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}


@described(anyOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOP_STRINGS}])
def _stop(value: Any) -> tuple[str, ...]:
    """Empty strings stop nothing: programs send them for "none"."""
    if isinstance(value, str):
        value = [value]
    return tuple(filter(None, list_of(string, "strings", max_len=MAX_STOP_STRINGS)(value)))


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
    anyOf=[
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        },
        {"type": "array", "maxItems": 0},
    ],
    description="Token ids, as text, and what is added to their logits.",
)
def _logit_bias(value: Any) -> dict[int, float]:
    """An empty list is what PHP and some forms make of an empty object."""
    if value == []:
        return {}
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


def _token_limit(low: int) -> Check:
    """A number of tokens; None for llama.cpp's -1 and -2, which mean no limit but the context's."""

    @described(
        anyOf=[{"type": "integer", "minimum": low, "maximum": MAX_LIMIT}, {"enum": list(NO_LIMIT)}],
        description="Most tokens to generate; -1: as many as fit.",
    )
    def check(value: Any) -> int | None:
        found: int = integer(value)
        if found in NO_LIMIT:
            return None
        if not low <= found <= MAX_LIMIT:
            raise MismatchError(f"at least {low} and at most {MAX_LIMIT}, or -1 for no limit")
        return found

    return check


@described(type="integer", minimum=-1, maximum=INT_BOUND - 1, description="0 or -1: all tokens.")
def _top_k(value: Any) -> int:
    found = int(integer(value))
    return 0 if found == -1 else found


@described(type="number", minimum=0, maximum=1, description="0: the likeliest token alone.")
def _top_p(value: Any) -> float:
    """The smallest nucleus there is stands for 0: it holds the likeliest token."""
    return float(number(value)) or sys.float_info.min


@described(type="integer", minimum=1 - INT_BOUND, maximum=INT_BOUND - 1, description="-1: another one every time.")
def _seed(value: Any) -> int | None:
    return None if (found := integer(value)) == ANY_SEED else int(found)


@described(anyOf=[{"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"enum": [False]}])
def _num_logprobs(value: Any) -> int | None:
    """The completions' `logprobs`. A chat's is true or false, and the latter is sent here as well."""
    return None if value is False else int(between(0, MAX_LOGPROBS)(value))


@described(type="number", exclusiveMinimum=0)
def _timeout(value: Any) -> float:
    return float(number(value))  # RequestOptions checks the bound


# Ranges are not repeated here: SamplingParams checks them.
SAMPLING_FIELDS = (
    Field("temperature", number),
    Field("top_p", _top_p),
    Field("top_k", _top_k),
    Field("min_p", number),
    Field("repetition_penalty", number),
    Field("presence_penalty", number),
    Field("frequency_penalty", number),
    Field("logit_bias", _logit_bias),
    Field("seed", _seed),
    Field("stop", _stop),
    Field("stop_token_ids", list_of(integer, "token ids", max_len=MAX_BIASES)),
    Field("ignore_eos", boolean),
)
SAMPLING_NAMES = frozenset(field.name for field in SAMPLING_FIELDS)
COMMON_FIELDS = (
    *OUTPUT_FIELDS,
    Field("model", string, is_required=True),
    Field("n", between(1, MAX_N)),
    Field("best_of", between(1, MAX_N)),
    Field("stream", boolean),
    Field("stream_options", _stream_options),
    Field("cache_salt", string),
    Field("priority", between(-MAX_PRIORITY, MAX_PRIORITY)),
    Field("timeout", _timeout),
    Field("extra_body", any_object),
)
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "num_predict")
"""The smallest of those that are given counts."""
COMPLETION_FIELDS = table(
    COMPLETION,
    *COMMON_FIELDS,
    *(Field(name, _token_limit(0)) for name in TOKEN_LIMITS),
    *SAMPLING_FIELDS,
    Field("prompt", _prompts, is_required=True),
    Field("logprobs", _num_logprobs),
    Field("echo", boolean),
    Field("add_special_tokens", boolean),
    also=REQUEST,
)
CHAT_FIELDS = table(
    CHAT,
    *COMMON_FIELDS,
    *(Field(name, _token_limit(1)) for name in TOKEN_LIMITS),
    *SAMPLING_FIELDS,
    Field("messages", read_messages, is_required=True),
    Field("logprobs", boolean),
    Field("top_logprobs", between(0, MAX_LOGPROBS)),
    *TOOL_USE_FIELDS,
    also=REQUEST,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What both calls share. `params.max_tokens` means nothing until `for_choice` has set it."""

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
    add_special_tokens: bool

    @property
    def is_scored(self) -> bool:
        """Whether the prompt is repeated with its log-probabilities."""
        return self.is_echo and self.params.logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: tuple[Mapping[str, Any], ...]
    tool_use: ToolUse | None


def read_completion(raw: Mapping[str, Any]) -> CompletionRequest:
    """Check a completion request. Raises InvalidRequest."""
    values = read_fields(_flat(raw), COMPLETION_FIELDS)
    logprobs = values.get("logprobs")
    common = _common(values, logprobs)
    is_echo = values.get("echo", False)
    max_tokens = common["max_tokens"]
    if max_tokens == 0 and not is_echo:
        raise InvalidRequest("max_tokens must be at least 1, unless echo is true", param="max_tokens")
    if is_echo and (logprobs is not None or max_tokens == 0):
        common["params"] = replace(common["params"], prompt_logprobs=logprobs or 0)
    if not values.keys() & set(TOKEN_LIMITS):
        common["max_tokens"] = DEFAULT_COMPLETION_TOKENS
    return CompletionRequest(
        prompts=values["prompt"],
        is_echo=is_echo,
        add_special_tokens=values.get("add_special_tokens", True),
        **common,
    )


def read_chat(raw: Mapping[str, Any], *, tool_format: ToolFormat = GENERIC) -> ChatRequest:
    """Check a chat request for a model that writes calls in `tool_format`. Raises InvalidRequest."""
    values = read_fields(_flat(raw), CHAT_FIELDS)
    wants_logprobs = values.get("logprobs", False)
    if values.get("top_logprobs", 0) and not wants_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = values.get("top_logprobs", 0) if wants_logprobs else None
    common = _common(values, logprobs)
    tool_use = wanted_tools(values)
    if tool_use is not None:
        if common["params"].constraint is not None:
            raise InvalidRequest(
                "tools and a form of the answer exclude each other, unless tool_choice is none", param="tools"
            )
        common["params"] = replace(common["params"], constraint=tool_use.constraint(tool_format))
    return ChatRequest(messages=values["messages"], tool_use=tool_use, **common)


def _flat(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request with the fields of `extra_body` beside its own, where the official Python client puts them."""
    extra = raw.get("extra_body")
    if not isinstance(extra, dict):
        return raw
    return {**raw, **{name: value for name, value in extra.items() if raw.get(name) is None}}


def _common(values: Mapping[str, Any], logprobs: int | None) -> dict[str, Any]:
    num_choices = values.get("n", 1)
    best_of = values.get("best_of", num_choices)
    if best_of != num_choices:
        raise UnsupportedField(f"best_of must be absent or equal n ({num_choices}), got {best_of}", param="best_of")
    is_stream = values.get("stream", False)
    options = values.get("stream_options", frozenset())
    if "stream_options" in values and not is_stream:
        note_ignored("stream_options")  # a reply in one piece has its usage anyway
    sampling = {name: value for name, value in values.items() if name in SAMPLING_NAMES}
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = frozenset(sampling["stop_token_ids"])
    return {
        "params": SamplingParams(logprobs=logprobs, constraint=wanted_form(values), **sampling),
        "max_tokens": _max_tokens(values),
        "n": num_choices,
        "is_stream": is_stream,
        "include_usage": "include_usage" in options,
        "has_running_usage": {"include_usage", "continuous_usage_stats"} <= options,
        "options": RequestOptions(
            cache_salt=values.get("cache_salt", ""),
            priority=values.get("priority", 0),
            timeout_s=values.get("timeout"),
        ),
    }


def _max_tokens(values: Mapping[str, Any]) -> int | None:
    """The smallest of the limits given; None: no limit."""
    return min((values[name] for name in TOKEN_LIMITS if values.get(name) is not None), default=None)
