"""The fields that say how tokens are chosen and how many: the rows that both requests share, and their checks.

SamplingParams checks the ranges. Knows nothing of HTTP or of generation.
"""

from collections.abc import Mapping
from typing import Any

from runtime.core import MAX_STOP_CHARS, MAX_STOP_STRINGS, RANGES
from runtime.errors import InvalidRequest
from serve.fields.checks import Check, MismatchError, boolean, described, integer, list_of, number, shown, string
from serve.fields.reading import Field

MAX_BIASES = 1024
"""Bounds the sampler's work per token."""
MAX_LIMIT = 2**31
NO_LIMIT = (-1, -2)
STOP_TEXT: dict[str, Any] = {"type": "string", "maxLength": MAX_STOP_CHARS}


@described(anyOf=[STOP_TEXT, {"type": "array", "items": STOP_TEXT, "maxItems": MAX_STOP_STRINGS}])
def _stop(value: Any) -> tuple[str, ...]:
    """Empty strings are dropped: programs send them to say that there is no stop string."""
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
    description="The numbers that are added to logits, by token id as text.",
)
def _logit_bias(value: Any) -> dict[int, float]:
    """An empty list counts as an empty object: PHP and some web forms send it so."""
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


@described(
    type="number",
    minimum=RANGES["repetition_penalty"].low,
    maximum=RANGES["repetition_penalty"].high,
    description="llama.cpp's name for repetition_penalty.",
)
def _repeat_penalty(value: Any) -> float:
    return float(number(value))


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
"""These become fields of SamplingParams with the same names."""
SAMPLING_NAMES = frozenset(field.name for field in SAMPLING_FIELDS)
REPEAT_PENALTY = Field("repeat_penalty", _repeat_penalty)
TOKEN_LIMITS = (
    "max_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "max_output_tokens",
    "num_predict",
    "n_predict",
)
"""Names of the limit. If several are given, the smallest counts."""


def limit_fields(low: int) -> tuple[Field, ...]:
    """A row for each name of the limit; `low` is the smallest valid limit."""
    return tuple(Field(name, _token_limit(low)) for name in TOKEN_LIMITS)


def _token_limit(low: int) -> Check:
    """A number of tokens. llama.cpp's -1 and -2 mean no limit but the context; they are returned as None."""

    @described(
        anyOf=[{"type": "integer", "minimum": low, "maximum": MAX_LIMIT}, {"enum": list(NO_LIMIT)}],
        description="Largest number of tokens to generate; -1: as many as fit.",
    )
    def check(value: Any) -> int | None:
        found: int = integer(value)
        if found in NO_LIMIT:
            return None
        if not low <= found <= MAX_LIMIT:
            raise MismatchError(f"at least {low} and at most {MAX_LIMIT}, or -1 for no limit")
        return found

    return check


def max_tokens(values: Mapping[str, Any]) -> int | None:
    """The smallest limit of the request; None: no limit."""
    return min((values[name] for name in TOKEN_LIMITS if values.get(name) is not None), default=None)


def sampling_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The checked fields that belong to SamplingParams. Raises InvalidRequest if both names of a penalty are given and
    differ."""
    found = {name: value for name, value in values.items() if name in SAMPLING_NAMES}
    if "stop_token_ids" in found:
        found["stop_token_ids"] = frozenset(found["stop_token_ids"])
    if (alias := values.get("repeat_penalty")) is not None:
        own = found.setdefault("repetition_penalty", alias)
        if own != alias:
            raise InvalidRequest(
                f"repeat_penalty ({alias}) and repetition_penalty ({own}) mean the same and differ; give one",
                param="repeat_penalty",
            )
    return found
