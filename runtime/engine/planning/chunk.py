"""How many prompt tokens a step runs: as many as its latency bounds leave time for.

    no stream runs            the fastest number, but no step longer than half of `ttft_s`: a newcomer waits for it
    streams run               what fits into `tpot_s` beside the decode run that the step began with
    and prompts are late      what fits into half of `ttft_s`, until they are in time again

A prompt is late if it and the prompts before it cannot have their first tokens within `ttft_s` at the second rate. One
that takes longer than a step even alone is never late: streams do not pause for it. Knows seconds and tokens; no
sequences and no slots.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

FASTEST = 512
"""Tokens of a run beyond which it gets no faster. On two cores of a Zen 4 (SmolLM2-135M in w8a8) eight prompts of 64
together run at 2,060 tokens/s and eight of 128 at 1,820; one prompt of 128 at 1,560, of 512 at 1,350, of 1,024 at
1,210."""
LEAST = 32
"""Fewer tokens are not run: beside the fixed cost of a run they would be slow, and a prompt must get on."""
UNMEASURED = 128
"""Tokens beside streams before a prefill was measured."""
FIXED = 12
"""What a run costs beside its tokens, in tokens: about 9 ms where a token takes 0.8."""
EARLIER = 0.5
"""First guess of what 1,024 tokens before it in its slot add to the cost of a token."""
GAIN = 0.3
MAX_SURPRISE = 2.0
"""A run counts as at most this many times its estimate: some runs are interrupted."""


class LatencyBounds(NamedTuple):
    """Seconds to the first token of a prompt, and between two tokens of a stream."""

    ttft_s: float = 1.0
    tpot_s: float = 0.2


DEFAULT_BOUNDS = LatencyBounds()


class Piece(NamedTuple):
    """Tokens of a prompt, and how many of it come before them."""

    num_tokens: int
    past_len: int = 0


class PendingPrompt(NamedTuple):
    """The rest of a prompt, the length of all of it, and seconds since it was submitted."""

    left: Piece
    num_prompt: int
    age_s: float


class PrefillCost:
    """Seconds of a prefill run, learned as runs go by (normalized least mean squares).

    seconds = token * (tokens + FIXED) + pair * (tokens * mean tokens before them / 1024)
    """

    def __init__(self) -> None:
        self._token_s: float | None = None
        self._pair_s = 0.0

    @property
    def is_known(self) -> bool:
        return self._token_s is not None

    def observe(self, pieces: Iterable[Piece], seconds: float) -> None:
        """Note a run of these pieces."""
        tokens, pairs = _amounts(pieces)
        if self._token_s is None:
            self._token_s = seconds / (tokens + EARLIER * pairs)
            self._pair_s = EARLIER * self._token_s
            return
        estimate_s = self._token_s * tokens + self._pair_s * pairs
        step = GAIN * (min(seconds, MAX_SURPRISE * estimate_s) - estimate_s) / (tokens**2 + pairs**2)
        self._token_s += step * tokens
        self._pair_s = max(0.0, self._pair_s + step * pairs)

    def seconds(self, pieces: Iterable[Piece]) -> float:
        """How long a run of these pieces will take; 0 before one was measured."""
        tokens, pairs = _amounts(pieces)
        return (self._token_s or 0.0) * tokens + self._pair_s * pairs

    def num_tokens(self, seconds: float, past_len: int) -> int:
        """Tokens behind so many of their prompt that run in so many seconds, perhaps below 0."""
        assert self._token_s is not None
        return int(seconds / (self._token_s + self._pair_s * past_len / 1024)) - FIXED


def _amounts(pieces: Iterable[Piece]) -> tuple[float, float]:
    tokens, pairs = float(FIXED), 0.0
    for num, past in pieces:
        tokens += num
        pairs += num * (past + num / 2) / 1024
    return tokens, pairs


class ChunkSize:
    """Chooses the prompt tokens of each step.

    fixed: always so many, whatever the bounds; limit: most that the session takes
    """

    def __init__(self, bounds: LatencyBounds, *, fixed: int | None = None, limit: int = FASTEST) -> None:
        self._bounds, self._fixed = bounds, fixed
        self._limit = min(FASTEST if fixed is None else fixed, limit)
        self._cost = PrefillCost()

    @property
    def limit(self) -> int:
        """Most tokens of any step."""
        return self._limit

    def observe(self, pieces: Iterable[Piece], seconds: float) -> None:
        """Note the time of a prefill run."""
        self._cost.observe(pieces, seconds)

    def of_step(self, pending: Sequence[PendingPrompt], *, has_streams: bool, elapsed_s: float) -> int:
        """Most tokens of this step, of which `elapsed_s` seconds are over.

        `pending` in the order in which they will run, at least one.
        """
        if self._fixed is not None:
            return self._limit
        if not self._cost.is_known:
            return min(UNMEASURED, self._limit) if has_streams else self._limit
        past_len, (ttft_s, tpot_s) = pending[0].left.past_len, self._bounds
        step_s = max(ttft_s / 2, tpot_s)
        most = self._clipped(self._cost.num_tokens(step_s - elapsed_s, past_len))
        if not has_streams:
            return most
        beside = self._clipped(self._cost.num_tokens(tpot_s - elapsed_s, past_len))
        return most if beside < most and self._is_late(pending, beside) else beside

    def _clipped(self, num_tokens: int) -> int:
        return min(max(num_tokens, LEAST), self._limit)

    def _is_late(self, pending: Sequence[PendingPrompt], chunk: int) -> bool:
        """Whether the last of the prompts that can be in time will not be, with chunks of this size."""
        age_s, num_tokens = 0.0, 0
        for prompt in pending:
            if self._cost.seconds([Piece(prompt.num_prompt)]) <= self._bounds.ttft_s / 2:
                age_s = max(age_s, prompt.age_s)
                num_tokens += prompt.left.num_tokens
        return num_tokens > 0 and age_s + num_tokens / chunk * self._bounds.tpot_s > self._bounds.ttft_s
