"""What a client may ask for: OpenAI's two generation requests, as tables of fields and as the dataclasses they become.

The rows here are the supported fields; the ignored and the refused ones are in serve/fields/foreign.py. Names and
meanings follow https://platform.openai.com/docs/api-reference; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`stop_token_ids` have the names that other servers use. Knows nothing of HTTP or of generation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtime.core import MAX_LOGPROBS, MAX_PRIORITY, RequestOptions, SamplingParams
from runtime.errors import InvalidRequest, UnsupportedField
from runtime.text.chat.options import ChatOptions
from runtime.text.tools.formats import GENERIC, ToolFormat
from serve.fields.checks import Json, any_object, between, boolean, described, number, string
from serve.fields.foreign import CHAT, COMPLETION, REQUEST, STREAM_OPTIONS, table
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
from serve.fields.reading import Field, note_ignored, object_of, read_fields
from serve.fields.sampling import (
    REPEAT_PENALTY,
    SAMPLING_FIELDS,
    TOKEN_LIMITS,
    limit_fields,
    max_tokens,
    sampling_values,
)
from serve.fields.tools import TOOL_USE_FIELDS, ToolUse, wanted_tools

MAX_N = 16
MAX_CUT = 8
"""A prompt that will be cut may be this many times as long as the context; it is tokenized before it is cut."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat gets the rest of the context."""

STREAM_OPTIONS_FIELDS = table(STREAM_OPTIONS, Field("include_usage", boolean), Field("continuous_usage_stats", boolean))
"""`continuous_usage_stats` is vLLM's, for load generators: the usage so far in every chunk."""


@object_of(STREAM_OPTIONS_FIELDS)
def _stream_options(found: Json, _: str) -> frozenset[str]:
    """The names of the options that are true."""
    return frozenset(name for name, is_on in found.items() if is_on)


@described(anyOf=[{"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"enum": [False]}])
def _num_logprobs(value: Any) -> int | None:
    """The `logprobs` of completions. In chats it is a boolean, and clients send false here too."""
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
    """The fields that both requests share. `for_choice` sets `params.max_tokens`; ignore its value until then."""

    params: SamplingParams
    max_tokens: int | None
    """None: the rest of the context after the prompt."""
    n: int
    is_stream: bool
    include_usage: bool
    has_running_usage: bool
    """Whether every chunk contains the usage so far."""
    options: RequestOptions
    prediction: str | None
    """The answer that the client expects."""
    truncate_prompt_tokens: int | None

    @property
    def one_call_of(self) -> tuple[str, ...]:
        """Functions whose first call ends the answer."""
        return ()

    def max_prompt(self, max_len: int) -> int:
        """Most tokens a prompt may have before it is cut: more than the context if it will be cut."""
        return max_len if self.truncate_prompt_tokens is None else MAX_CUT * max_len

    def cut_prompt(self, prompt_ids: list[int], max_len: int) -> list[int]:
        """The prompt without the tokens that `truncate_prompt_tokens` removes from its beginning."""
        num_kept = self.truncate_prompt_tokens
        if num_kept is None:
            return prompt_ids
        if num_kept == WHAT_FITS:
            least = max(1, self.params.min_tokens)
            num_kept = max(1, max_len - (least if self.max_tokens is None else self.max_tokens))
        return prompt_ids[-num_kept:]

    def for_choice(self, choice_idx: int, prompt_len: int, max_len: int) -> SamplingParams:
        """Parameters of one choice of a prompt of `prompt_len` tokens.

        Choice k has the seed `seed` + k. So the choices differ, and the first is the same as with n=1.
        """
        # If the prompt fills the context, ask for one token anyway: the engine's error names both lengths.
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
        """Whether the reply repeats the prompt with its log-probabilities."""
        return self.is_echo and self.params.logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: tuple[Mapping[str, Any], ...]
    tool_use: ToolUse | None
    chat_options: ChatOptions
    may_call_or_answer: bool
    """Whether a grammar allows calls or a form of the answer, and nothing else."""

    @property
    def one_call_of(self) -> tuple[str, ...]:
        """None with a constraint, which itself ends the answer after one call."""
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
            note_ignored(form.param)  # the form is for answers, and calls are none
    return ChatRequest(
        messages=values["messages"],
        tool_use=tool_use,
        chat_options=chat_options(values),
        may_call_or_answer=tool_use is not None and not tool_use.forced and form is not None,
        **common,
    )


def _flat(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request with the fields of `extra_body` at the top level, where OpenAI's Python client puts them."""
    extra = raw.get("extra_body")
    if not isinstance(extra, dict):
        return raw
    return {**raw, **{name: value for name, value in extra.items() if raw.get(name) is None}}


def _common(values: Mapping[str, Any], logprobs: int | None) -> Json:
    """The arguments of GenerationRequest. Raises InvalidRequest."""
    num_choices = values.get("n", 1)
    best_of = values.get("best_of", num_choices)
    if best_of != num_choices:
        raise UnsupportedField(f"best_of must be absent or equal n ({num_choices}), got {best_of}", param="best_of")
    is_stream = values.get("stream", False)
    options = values.get("stream_options", frozenset())
    if "stream_options" in values and not is_stream:
        note_ignored("stream_options")  # a reply that is not streamed always has its usage
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
