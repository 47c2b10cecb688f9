"""What a client may ask for: the fields of OpenAI's two generation calls, as tables, and what they become.

Knows nothing of HTTP or of generation. The rows here are the honoured fields; those taken without effect and those
refused are in serve/field_classes.py. The reference for names and meanings is
https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`stop_token_ids` are what the field's other servers call these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.chat_options import ChatOptions
from runtime.core import MAX_LOGPROBS, MAX_PRIORITY, MAX_STOP_STRINGS, RANGES, RequestOptions, SamplingParams
from runtime.errors import InvalidRequest, UnsupportedField
from runtime.tool_formats import GENERIC, ToolFormat
from serve.field_classes import CHAT, COMPLETION, REQUEST, STREAM_OPTIONS, table
from serve.fields import (
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
from serve.prompt_fields import (
    CHAT_TEMPLATE_FIELDS,
    WHAT_FITS,
    Prompt,
    chat_options,
    kept_tokens,
    prediction,
    prompts,
)
from serve.tool_fields import TOOL_USE_FIELDS, ToolUse, wanted_tools

MAX_N = 16
MAX_LIMIT = 2**31
NO_LIMIT = (-1, -2)
MAX_BIASES = 1024
"""Bounds the work the sampler does per token for one request."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat gets what is left of the context."""


@described(anyOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOP_STRINGS}])
def _stop(value: Any) -> tuple[str, ...]:
    """Empty strings stop nothing: programs send them for "none"."""
    if isinstance(value, str):
        value = [value]
    return tuple(filter(None, list_of(string, "strings", max_len=MAX_STOP_STRINGS)(value)))


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


@described(
    type="number",
    minimum=RANGES["repetition_penalty"].low,
    maximum=RANGES["repetition_penalty"].high,
    description="llama.cpp's name for repetition_penalty.",
)
def _repeat_penalty(value: Any) -> float:
    return float(number(value))


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
    Field("min_tokens", integer),
    Field("top_p", number),
    Field("top_k", integer),
    Field("min_p", number),
    Field("typical_p", number),
    Field("repetition_penalty", number),
    Field("presence_penalty", number),
    Field("frequency_penalty", number),
    Field("logit_bias", _logit_bias),
    Field("seed", integer),
    Field("stop", _stop),
    Field("stop_token_ids", list_of(integer, "token ids", max_len=MAX_BIASES)),
    Field("ignore_eos", boolean),
    Field("skip_special_tokens", boolean),
    Field("include_stop_str_in_output", boolean),
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
    Field("repeat_penalty", _repeat_penalty),
    Field("truncate_prompt_tokens", kept_tokens),
    Field("prediction", prediction),
)
TOKEN_LIMITS = (
    "max_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "max_output_tokens",
    "num_predict",
    "n_predict",
)
"""The smallest of those that are given counts."""
COMPLETION_FIELDS = table(
    COMPLETION,
    *COMMON_FIELDS,
    *(Field(name, _token_limit(0)) for name in TOKEN_LIMITS),
    *SAMPLING_FIELDS,
    Field("prompt", prompts, is_required=True),
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
    *CHAT_TEMPLATE_FIELDS,
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
    prediction: str | None
    """What the client expects as the answer."""
    truncate_prompt_tokens: int | None

    @property
    def one_call_of(self) -> tuple[str, ...]:
        """Functions of which one call ends the answer; none: it ends by itself."""
        return ()

    def cut_prompt(self, prompt_ids: list[int], max_len: int) -> list[int]:
        """The end of a prompt, as long as the client wants it."""
        num_kept = self.truncate_prompt_tokens
        if num_kept is None:
            return prompt_ids
        if num_kept == WHAT_FITS:
            least = max(1, self.params.min_tokens)
            num_kept = max(1, max_len - (least if self.max_tokens is None else self.max_tokens))
        return prompt_ids[-num_kept:]

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
    chat_options: ChatOptions
    may_call_or_answer: bool
    """Whether the answer is held to calls or to a form, whichever it begins with."""

    @property
    def one_call_of(self) -> tuple[str, ...]:
        """Under a grammar, that sees to it."""
        use = self.tool_use
        if use is None or use.is_parallel or self.params.constraint is not None:
            return ()
        return tuple(tool.name for tool in use.tools)


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
    form = common["params"].constraint
    if tool_use is not None:
        common["params"] = replace(common["params"], constraint=tool_use.constraint(tool_format, form))
        if tool_use.forced and form is not None:
            note_ignored(form.param)  # calls are no answer
    return ChatRequest(
        messages=values["messages"],
        tool_use=tool_use,
        chat_options=chat_options(values),
        may_call_or_answer=tool_use is not None and not tool_use.forced and form is not None,
        **common,
    )


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
    if "repeat_penalty" in values:
        sampling["repetition_penalty"] = _one_of_two(values, "repetition_penalty", "repeat_penalty")
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
        "prediction": values.get("prediction"),
        "truncate_prompt_tokens": values.get("truncate_prompt_tokens"),
    }


def _one_of_two(values: Mapping[str, Any], name: str, alias: str) -> Any:
    """The value of a field that has two names. InvalidRequest if they differ."""
    if name in values and values[name] != values[alias]:
        raise InvalidRequest(
            f"{alias} ({values[alias]}) and {name} ({values[name]}) mean the same and differ; give one", param=alias
        )
    return values[alias]


def _max_tokens(values: Mapping[str, Any]) -> int | None:
    """The smallest of the limits given; None: no limit."""
    return min((values[name] for name in TOKEN_LIMITS if values.get(name) is not None), default=None)
