"""The shared nouns: what a request is and what comes back. Open this file first.

A `Request` goes into the engine; for each token one `TokenEvent` comes out, the last of them with a
`finish_reason`. Nothing here knows about HTTP, ONNX Runtime or files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from runtime.errors import InvalidRequest
from runtime.settings import setting

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


class Range(NamedTuple):
    """Bounds of a number, both included unless `is_low_open`."""

    low: float
    high: float | None
    is_low_open: bool = False


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(1, None),
    "temperature": Range(0, 2),
    "top_k": Range(0, None),
    "top_p": Range(0, 1, is_low_open=True),
    "min_p": Range(0, 1),
    # A logit is divided by it: by one near 0, it would leave float32.
    "repetition_penalty": Range(0.01, 10),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(2**63), 2**63 - 1),
    "logprobs": Range(0, MAX_LOGPROBS),
}
"""What SamplingParams takes, by field; the server's description of itself is made of the same."""


class FinishReason(StrEnum):
    """Why a request ended. STOP and LENGTH are OpenAI's words; the others end a request without an answer."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request. Checked once, here.

    temperature 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. Penalties follow OpenAI
    (presence, frequency: subtracted, generated tokens only) and CTRL (repetition: divides or multiplies,
    prompt and generated tokens, arXiv:1909.05858). Filters run in the order penalties, bias, temperature,
    top-k, top-p, min-p. Log-probabilities are those of the model, before any of that.
    """

    max_tokens: int = setting(16, "most tokens to generate")
    temperature: float = setting(1.0, "0 is greedy, 2 the wildest")
    top_k: int = setting(0, "choose among this many likeliest tokens; 0: all")
    top_p: float = setting(1.0, "choose among the likeliest tokens that reach this probability; 1: all")
    min_p: float = setting(0.0, "leave out tokens less likely than this times the likeliest")
    repetition_penalty: float = setting(1.0, "above 1: against repeating prompt and answer")
    presence_penalty: float = setting(0.0, "subtracted from the logits of tokens already generated")
    frequency_penalty: float = setting(0.0, "the same, once for each time a token was generated")
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata={"help": "add VALUE to the logit of token ID; may be repeated", "metavar": "ID=VALUE"},
    )
    seed: int | None = setting(None, "makes the choice of tokens repeatable")
    stop: tuple[str, ...] = setting((), "end before this text; may be repeated", metavar="TEXT")
    stop_token_ids: frozenset[int] = setting(frozenset(), "end at this token; may be repeated", metavar="ID")
    ignore_eos: bool = setting(False, "go on after an end-of-text token")
    logprobs: int | None = setting(None, "log-probabilities of the chosen and so many likeliest tokens")
    """None: no log-probabilities; 0: of the chosen token; n: also the n likeliest."""

    def __post_init__(self) -> None:
        for name, bounds in RANGES.items():
            if (value := getattr(self, name)) is not None:
                _check(name, value, bounds)
        for token_id, bias in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", bias, Range(-100, 100))
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} non-empty strings", param="stop")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _check(name: str, value: float, bounds: Range) -> None:
    param = name.partition("[")[0]
    if not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value}", param=param)
    low, high = bounds.low, bounds.high
    too_low = value <= low if bounds.is_low_open else value < low
    if too_low or (high is not None and value > high):
        bound = f"greater than {low}" if bounds.is_low_open else f"at least {low}"
        bound += "" if high is None else f" and at most {high}"
        raise InvalidRequest(f"{name} must be {bound}, got {value}", param=param)


class TokenLogprob(NamedTuple):
    """A token and its natural-log probability under the model."""

    token_id: int
    logprob: float


class TokenEvent(NamedTuple):
    """One generated token, or the end of a request without one (`token_id` None).

    `text` is what became final with this token: it can be empty (half a character, or the possible
    beginning of a stop string) and never contains a stop string.
    """

    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class TextPiece(NamedTuple):
    """What a token added to the text: final characters, and whether a stop string was completed."""

    text: str
    is_stopped: bool


class TextStream(Protocol):
    """Turns the token ids of one request into text, one by one. The engine knows text only through this."""

    def push(self, token_id: int) -> TextPiece:
        """Add a token; return the characters that are now final."""
        ...

    def finish(self) -> str:
        """Return the characters still held back. Called once, when the request ends by itself."""
        ...


EventSink = Callable[[TokenEvent], None]
"""Called on the engine's thread, once per event; must not block and must not raise."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence to generate. `prompt_ids` is not empty; `eos_ids` end it unless `params.ignore_eos`."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    sink: EventSink
    text: TextStream | None = None


class EngineStats(NamedTuple):
    """A look at the engine between two steps."""

    num_waiting: int
    num_running: int
    num_slots: int
    kv_used_tokens: int
    kv_total_tokens: int


class EngineObserver(Protocol):
    """Hears what the engine did; called on the engine's thread, must be quick. serve/metrics.py is one."""

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        """A step ran: rows decoded, prompt tokens prefilled, seconds in all and inside the session."""
        ...

    def on_first_token(self, *, ttft_s: float) -> None:
        """A request got its first token, this many seconds after it was submitted."""
        ...

    def on_finish(self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None) -> None:
        """A request ended; `tpot_s` is the mean seconds per token after the first, None below two tokens."""
        ...
