"""The shared nouns: what a request is and what comes back. Open this file first.

A `Request` goes into the engine; for each token one `TokenEvent` comes out, the last of them with a
`finish_reason`. Nothing here knows about HTTP, ONNX Runtime or files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from runtime.errors import InvalidRequest
from runtime.settings import setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1_000
"""Longest stop string: longer ones only cost memory."""
MAX_PRIORITY = 100


class Range(NamedTuple):
    """Bounds of a number, both included unless `is_low_open`."""

    low: float
    high: float | None
    is_low_open: bool = False


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(1, None),
    "temperature": Range(0, 2),
    "min_tokens": Range(0, None),
    "top_k": Range(-1, None),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "typical_p": Range(0, 1, is_low_open=True),
    # A logit is divided by it: by one near 0, it would leave float32.
    "repetition_penalty": Range(0.01, 10),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(2**63), 2**63 - 1),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
}
"""Valid values of SamplingParams, by field. The server's OpenAPI description is made from them."""
NO_ANSWER = Range(0, None)
"""Bounds of `max_tokens` where the prompt is scored."""
UNSET: Mapping[str, tuple[int, int | None]] = {"seed": (-1, None), "top_k": (-1, 0)}
"""By field: the value that means "not set" in other programs, and the value that replaces it."""


class FinishReason(StrEnum):
    """Why a request ended. STOP and LENGTH are OpenAI's words; the others end a request without an answer.

    TIMEOUT: its own time was up; QUEUE_TIMEOUT: no slot was free for longer than the engine lets a request wait.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    TIMEOUT = "timeout"
    QUEUE_TIMEOUT = "queue_timeout"


class ConstraintKind(StrEnum):
    """How a `Constraint` is written."""

    JSON_SCHEMA = "JSON schema"
    REGEX = "regular expression"
    GRAMMAR = "grammar"
    CHOICE = "list of choices"


@dataclass(frozen=True, slots=True)
class LateCheck:
    """The part of a JSON schema that its grammar cannot enforce. It is checked when the answer is complete.

    schema: the whole schema, as JSON in draft 2020-12
    left_out: JSON pointers of keywords that are not in the grammar, the first few; num_left_out: how many there are
    tool: the function whose arguments are checked; None: the answer itself
    """

    schema: str
    left_out: tuple[str, ...]
    num_left_out: int
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that an answer must have, as a request writes it; `runtime/grammar/grammar.py` reads it.

    source: a JSON schema as JSON; a regular expression that the whole answer matches; a grammar in Lark's or
        llama.cpp's (GBNF) notation; a JSON list of strings, one of which is the answer
    param: the request field it came from, for error messages
    late_checks: what the grammar does not enforce
    """

    kind: ConstraintKind
    source: str
    param: str
    late_checks: tuple[LateCheck, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request. Checked once, here.

    temperature 0 is greedy, and so is `top_p` 0. `top_k` 0 or -1 and `top_p` 1 switch those filters off. Penalties
    follow OpenAI (presence, frequency: subtracted, generated tokens only) and CTRL (repetition: divides or multiplies,
    prompt and generated tokens, arXiv:1909.05858). Filters run in the order penalties, bias, temperature, top-k, top-p,
    min-p, typical-p, each on what those before it left, as in transformers. Log-probabilities are those of the model,
    before any of that.
    """

    max_tokens: int = setting(16, "most tokens to generate")
    min_tokens: int = setting(0, "tokens before an end-of-text token, a stop token or a stop string may end the answer")
    """An answer held to a grammar ends where the grammar leaves nothing but the end, however short it is."""
    temperature: float = setting(1.0, "0 is greedy, 2 the wildest")
    top_k: int = setting(0, "choose among this many most likely tokens; 0 or -1: all")
    top_p: float = setting(1.0, "choose among the most likely tokens that reach this probability; 1: all; 0: one token")
    min_p: float = setting(0.0, "leave out tokens less likely than this times the most likely one")
    typical_p: float = setting(1.0, "choose among the most typical tokens that reach this probability; 1: all")
    """Locally typical sampling (arXiv:2202.00666): typical is a token whose -log(probability) is near the entropy."""
    repetition_penalty: float = setting(1.0, "above 1: fewer repetitions of prompt and answer")
    presence_penalty: float = setting(0.0, "subtracted from the logits of tokens already generated")
    frequency_penalty: float = setting(0.0, "the same, once for each time a token was generated")
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata={"help": "add VALUE to the logit of token ID; may be repeated", "metavar": "ID=VALUE"},
    )
    seed: int | None = setting(None, "makes the choice of tokens repeatable; -1: no seed")
    stop: tuple[str, ...] = setting((), "end before this text; may be repeated", metavar="TEXT")
    stop_token_ids: frozenset[int] = setting(frozenset(), "end at this token; may be repeated", metavar="ID")
    ignore_eos: bool = setting(False, "go on after an end-of-text token")
    skip_special_tokens: bool = setting(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = setting(False, "keep the stop string or token that ended the answer in the text")
    logprobs: int | None = setting(None, "log-probabilities of the chosen token and of this many most likely ones")
    """None: no log-probabilities; 0: of the chosen token; n: also of the n most likely ones."""
    constraint: Constraint | None = field(default=None, metadata={"help": "the form that the answer must have"})
    prompt_logprobs: int | None = setting(None, "the same as logprobs, for the tokens of the prompt")
    """With it, `max_tokens` may be 0: the prompt is scored, and nothing generated."""

    def __post_init__(self) -> None:
        for name, bounds in RANGES.items():
            if (value := getattr(self, name)) is not None:
                _check(name, value, NO_ANSWER if name == "max_tokens" and self.prompt_logprobs is not None else bounds)
        for name, (said, meant) in UNSET.items():
            if getattr(self, name) == said:
                object.__setattr__(self, name, meant)
        for token_id, bias in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", bias, Range(-100, 100))
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} non-empty strings", param="stop")
        if (longest := max(map(len, self.stop), default=0)) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop: a string of {longest:,} characters; at most {MAX_STOP_CHARS:,} are taken", param="stop"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0


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


class Logprobs(NamedTuple):
    """The log-probability of a token after those before it, and the most likely tokens in its place, best first."""

    logprob: float
    top_logprobs: tuple[TokenLogprob, ...]


class TokenEvent(NamedTuple):
    """One generated token, or the end of a request without one (`token_id` None).

    `prompt_logprobs`, if asked for, come in an event of their own before the first token. They begin with the second
    token of the prompt: nothing comes before the first.

    `text` is what became final with this token. It can be empty (half a character, or the possible beginning of a stop
    string) and never contains a stop string. `error_param` names the request field that caused an `error`, if one did.
    """

    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_param: str | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None


class TextPiece(NamedTuple):
    """What a token added to the text: final characters, and whether a stop string was completed."""

    text: str
    is_stopped: bool


class TextStream(Protocol):
    """Turns the token ids of one request into text, one by one. The engine knows text only through this."""

    def push(self, token_id: int) -> TextPiece:
        """Add a token; return the characters that are now final."""
        ...

    def finish(self, end_id: int | None = None) -> str:
        """Return the characters still held back. Called once, when the request ends by itself; `end_id` is the token at
        which it ends, if that was not pushed: an end of text or a stop token."""
        ...


class TokenGuide(Protocol):
    """Holds one request to its constraint, token by token. The engine knows grammars only through this.

    Every method may raise InvalidRequest, if the constraint turns out to be too complex; nothing but dropping the
    guide is allowed after that.
    """

    @property
    def is_stopped(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        ...

    def prepare(self, draft_ids: Sequence[int] = ()) -> None:
        """Begin to compute what `allowed` will return, here and after each token of a draft, on another thread.

        Optional: it takes that time off the engine's thread. Call it before the model runs. The draft may
        hold tokens that are not allowed; what follows those is not computed.
        """
        ...

    def allowed(self) -> "NDArray[np.bool_]":
        """bool [vocab_size]: the tokens that may come next. End-of-text tokens are among them where it may end."""
        ...

    def advance(self, token_id: int) -> None:
        """Take a token, which must be allowed."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens whose text is the only one allowed next; empty where there is a choice, or where finding out takes too
        long. The text is certain; the model may divide it into other tokens. Never raises."""
        ...

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens are allowed one after the other; all where finding out takes too long. Never
        raises."""
        ...


EventSink = Callable[[TokenEvent], None]
"""Called on the engine's thread, once per event; must not block and must not raise."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """Counts of prefix cache and speculation for one request. Complete when the last event comes."""

    num_cached: int = 0
    """Prompt tokens whose K and V came from the prefix cache."""
    num_drafted: int = 0
    """Draft tokens that were run."""
    num_accepted: int = 0
    """Draft tokens that were accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How the engine treats a request, apart from choosing its tokens. Checked once, here."""

    cache_salt: str = ""
    """Prompts share the prefix cache only with prompts of the same salt. Without it a client could find out what
    another one has sent, by its time to the first token."""
    tenant: str = ""
    """Whose request it is: a free slot goes to the tenant that has the fewest, among equal priorities."""
    priority: int = 0
    """Lower is served earlier; equal ones of a tenant in order of arrival."""
    timeout_s: float | None = None
    """The request ends this many seconds after its submission, finished or not."""
    prediction_ids: Sequence[int] = ()
    """The answer that the client expects: a draft for speculation. It changes no token."""

    def __post_init__(self) -> None:
        _check("priority", self.priority, Range(-MAX_PRIORITY, MAX_PRIORITY))
        if self.timeout_s is not None:
            _check("timeout", self.timeout_s, Range(0, None, is_low_open=True))


DEFAULT_OPTIONS = RequestOptions()


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence to generate. `prompt_ids` is not empty; `eos_ids` end it unless `params.ignore_eos`."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    sink: EventSink
    text: TextStream | None = None
    options: RequestOptions = DEFAULT_OPTIONS
    usage: Usage = field(default_factory=Usage)
    guide: TokenGuide | None = None


class EngineStats(NamedTuple):
    """A look at the engine between two steps."""

    num_waiting: int
    num_running: int
    num_slots: int
    kv_used_tokens: int
    kv_total_tokens: int
    kv_used_bytes: int
    """Memory of slots and prefix cache that is really taken."""
    kv_total_bytes: int
    prefix_cache_bytes: int
    num_preempted: int
    """How often a request lost its slot because memory ran out."""


class EngineObserver(Protocol):
    """Is told what the engine did, on the engine's thread; must be quick. serve/observe/engine_metrics.py is one."""

    def on_step(self, *, num_decode: int, num_prefill_tokens: int, step_s: float, model_s: float) -> None:
        """A step ran: rows decoded, prompt tokens prefilled, seconds in all and inside the session."""
        ...

    def on_first_token(self, *, ttft_s: float) -> None:
        """A request got its first token, this many seconds after it was submitted."""
        ...

    def on_finish(
        self, *, reason: FinishReason, num_prompt: int, num_generated: int, tpot_s: float | None, usage: Usage
    ) -> None:
        """A request ended; `tpot_s` is the mean seconds per token after the first, None below two tokens."""
        ...
