"""How much each key may use in a minute. Knows keys and numbers, nothing of HTTP but the names of its headers.

Requests are counted in a moving window. Tokens are counted in fixed windows of a minute, for two reasons: how
many an answer will have is only known when it has ended, so they are booked afterwards, beyond the limit if
need be; and only a counter can take that. A key is refused while its window is used up, so it can pass its
limit by what it had running at once, never by more.

`limits` (MIT) counts; Flask-Limiter is the same library behind decorators that do not know a cost at the end,
pyrate-limiter has no way to book beyond a limit.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from runtime.errors import InvalidRequest, Overloaded
from serve.api_keys import ApiKey


class RateLimitedError(Overloaded):
    """A key has used up its minute. `retry_after` is in seconds."""


@dataclass(frozen=True, slots=True)
class _Window:
    """What is left of one limit, and the seconds until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


class RateLimits:
    """The counters of every key; they live as long as the process. Every method may be called from any thread."""

    def __init__(self) -> None:
        storage = MemoryStorage()
        self._requests = MovingWindowRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)
        self._lock = threading.Lock()  # MemoryStorage loses counts when two threads meet at the end of a window

    def take_request(self, key: ApiKey) -> None:
        """Count a request. Raises RateLimitedError if it is one too many, or no token is left for its answer."""
        with self._lock:
            tokens = self._window(self._tokens, key, key.tokens_per_minute, "tokens")
            if tokens is not None and tokens.remaining < 1:
                raise _refusal(key, "tokens", tokens)
            if key.requests_per_minute is None:
                return
            if not self._requests.hit(RateLimitItemPerMinute(key.requests_per_minute), key.name, "requests"):
                window = self._window(self._requests, key, key.requests_per_minute, "requests")
                assert window is not None
                raise _refusal(key, "requests", window)

    def take_prompt(self, key: ApiKey, num_tokens: int) -> None:
        """Book a prompt. Raises RateLimitedError if the minute has no room for it, InvalidRequest if none ever has."""
        limit = key.tokens_per_minute
        if limit is None:
            return
        if num_tokens > limit:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens and the key {key.name} may use {limit} in a minute; shorten it",
                param="prompt",
            )
        item = RateLimitItemPerMinute(limit)
        with self._lock:
            if not self._tokens.test(item, key.name, "tokens", cost=num_tokens):
                window = self._window(self._tokens, key, limit, "tokens")
                assert window is not None
                raise _refusal(key, "tokens", window)
            self._tokens.hit(item, key.name, "tokens", cost=num_tokens)

    def book_answer(self, key: ApiKey, num_tokens: int) -> None:
        """Book what was generated, when the request has ended."""
        if key.tokens_per_minute is not None and num_tokens:
            with self._lock:
                self._tokens.hit(RateLimitItemPerMinute(key.tokens_per_minute), key.name, "tokens", cost=num_tokens)

    def headers(self, key: ApiKey) -> Mapping[str, str]:
        """OpenAI's x-ratelimit headers for the limits that this key has."""
        rows = (
            ("requests", self._requests, key.requests_per_minute),
            ("tokens", self._tokens, key.tokens_per_minute),
        )
        found = {}
        with self._lock:
            for what, limiter, limit in rows:
                if (window := self._window(limiter, key, limit, what)) is not None:
                    found[f"x-ratelimit-limit-{what}"] = str(window.limit)
                    found[f"x-ratelimit-remaining-{what}"] = str(window.remaining)
                    found[f"x-ratelimit-reset-{what}"] = f"{window.reset_s:.3f}s"
        return found

    def _window(self, limiter: RateLimiter, key: ApiKey, limit: int | None, what: str) -> _Window | None:
        if limit is None:
            return None
        stats = limiter.get_window_stats(RateLimitItemPerMinute(limit), key.name, what)
        is_used = stats.remaining < limit
        return _Window(limit, stats.remaining, max(0.0, stats.reset_time - time.time()) if is_used else 0.0)


def _refusal(key: ApiKey, what: str, window: _Window) -> RateLimitedError:
    retry_after = max(1, ceil(window.reset_s))
    return RateLimitedError(
        f"the key {key.name} has used its {window.limit} {what} of this minute; try again in {retry_after} s",
        retry_after=retry_after,
    )
