"""What a client may ask for: the fields of OpenAI's two generation calls, as tables, and what they become.

Knows nothing of HTTP or of generation. The rows here are the honoured fields; those taken without effect and those
refused are in serve/fields/classes.py. The reference for names and meanings is
https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`stop_token_ids` are what the field's other servers call these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.core import MAX_LOGPROBS, MAX_PRIORITY, RequestOptions, SamplingParams
from runtime.errors import InvalidRequest, UnsupportedField
from runtime.text.chat.options import ChatOptions
from runtime.text.tools.formats import GENERIC, ToolFormat
from serve.fields.classes import CHAT, COMPLETION, REQUEST, STREAM_OPTIONS, table
from serve.fields.messages import read_messages
from serve.fields.output_format import OUTPUT_FIELDS, wanted_form
from serve.fields.prompt import (
    CHAT_TEMPLATE_FIELDS,
    WHAT_FITS,
    Prompt,
    chat_options,
    kept_tokens,
    prediction,
    prompts,
)
from serve.fields.sampling import (
    REPEAT_PENALTY,
    SAMPLING_FIELDS,
    TOKEN_LIMITS,
    limit_fields,
    max_tokens,
    sampling_values,
)
from serve.fields.tables import (
    Field,
    MismatchError,
    any_object,
    between,
    boolean,
    described,
    note_ignored,
    number,
    read_fields,
    string,
    table_schema,
)
from serve.fields.tools import TOOL_USE_FIELDS, ToolUse, wanted_tools

MAX_N = 16
MAX_CUT = 8
"""Of how many contexts' length a prompt may be that is cut; it is tokenized whole before."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat gets what is left of the context."""

STREAM_OPTIONS_FIELDS = table(STREAM_OPTIONS, Field("include_usage", boolean), Field("continuous_usage_stats", boolean))
"""The second is vLLM's, which load generators ask for: the usage so far in every chunk."""


@described(**table_schema(STREAM_OPTIONS_FIELDS))
def _stream_options(value: Any) -> frozenset[str]:
    """The options that are true."""
    if not isinstance(value, dict):
        raise MismatchError("an object")
    options = read_fields(value, STREAM_OPTIONS_FIELDS, "stream_options.")
    return frozenset(name for name, is_on in options.items() if is_on)


@described(anyOf=[{"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"enum": [False]}])
def _num_logprobs(value: Any) -> int | None:
    """The completions' `logprobs`. A chat's is true or false, and the latter is sent here as well."""
    return None if value is False else int(between(0, MAX_LOGPROBS)(value))


@described(type="number", exclusiveMinimum=0)
def _timeout(value: Any) -> float:
    return float(number(value))  # RequestOptions checks the bound


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
    REPEAT_PENALTY,
    Field("truncate_prompt_tokens", kept_tokens),
    Field("prediction", prediction),
)
COMPLETION_FIELDS = table(
    COMPLETION,
    *COMMON_FIELDS,
    *limit_fields(0),
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
    *limit_fields(1),
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

    def max_prompt(self, max_len: int) -> int:
        """Most tokens that are read of a prompt: one that is to be cut may be longer than the context."""
        return max_len if self.truncate_prompt_tokens is None else MAX_CUT * max_len

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
    return {
        "params": SamplingParams(logprobs=logprobs, constraint=wanted_form(values), **sampling_values(values)),
        "max_tokens": max_tokens(values),
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
