"""How much each key may use. Knows keys and numbers, and the names of the HTTP headers.

    begin            a request arrives: it needs room in its key's minute and among the key's requests at once
    reserve_prompt   the prompt's length is known: it needs room in the minute too
    settle           the reply's status is known: the reservation is counted, or dropped if the request was refused
    end              the reply is out: the answer's tokens are counted and the request no longer runs

Requests are counted in a moving window. Tokens are counted in fixed windows of a minute: an answer's length is known
only at its end, so its tokens are booked afterwards, over the limit if need be, and only a plain counter allows that. A
key with a used-up window is refused. So a key exceeds its limit at most by the requests that it had running.

The library `limits` (MIT) counts. Flask-Limiter is a decorator around it that cannot book a cost at the end, and
pyrate-limiter cannot book over a limit. No library can take a count back, so reservations are kept here.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from runtime.errors import InvalidRequest, Overloaded
from serve.access.api_keys import ApiKey

REQUESTS, TOKENS = "requests", "tokens"
BUSY_RETRY_S = 1
"""Retry-After in seconds if the key has too many requests running. When one will end is unknown."""


class RateLimitedError(Overloaded):
    """A key has reached its limit of a minute, or has too many requests running. `retry_after` is in seconds."""


@dataclass(slots=True)
class Reservation:
    """The part of its key's limits that one request holds until it is settled."""

    key: ApiKey
    num_requests: int = 1
    num_tokens: int = 0
    is_running: bool = True


@dataclass(frozen=True, slots=True)
class _Window:
    """The rest of one limit, and the seconds until all of it is available again."""

    limit: int
    remaining: int
    reset_s: float


class RateLimits:
    """The counters of every key; they live as long as the process. Every method may be called from any thread."""

    def __init__(self) -> None:
        storage = MemoryStorage()
        self._limiters: dict[str, RateLimiter] = {
            REQUESTS: MovingWindowRateLimiter(storage),
            TOKENS: FixedWindowRateLimiter(storage),
        }
        self._reserved: Counter[tuple[str, str]] = Counter()  # by the key's name, and REQUESTS or TOKENS
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()  # two threads at the end of a window would make MemoryStorage lose counts

    def begin(self, key: ApiKey) -> Reservation:
        """Reserve a request. Raises RateLimitedError if the key has no request left, or no token for the answer."""
        with self._lock:
            at_once = key.requests_at_once
            if at_once is not None and self._running[key.name] >= at_once:
                raise RateLimitedError(
                    f"the key {key.name} has {self._running[key.name]} requests running and may have {at_once} at "
                    "once; try again when one has ended",
                    retry_after=BUSY_RETRY_S,
                )
            self._check_room(key, TOKENS, 1)
            self._check_room(key, REQUESTS, 1)
            self._reserved[key.name, REQUESTS] += 1
            self._running[key.name] += 1
        return Reservation(key)

    def reserve_prompt(self, reservation: Reservation, num_tokens: int) -> None:
        """Reserve a prompt. Raises RateLimitedError if it exceeds the rest of this minute, InvalidRequest if it exceeds
        the limit of a whole minute."""
        key, limit = reservation.key, reservation.key.tokens_per_minute
        if limit is not None and num_tokens > limit:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens and the key {key.name} may use {limit} in a minute; shorten it",
                param="prompt",
            )
        with self._lock:
            self._check_room(key, TOKENS, num_tokens)
            self._reserved[key.name, TOKENS] += num_tokens
            reservation.num_tokens += num_tokens

    def settle(self, reservation: Reservation, *, is_refused: bool) -> None:
        """Count the reservation, or drop it: a refusal costs nothing. Idempotent."""
        with self._lock:
            for what, count in ((REQUESTS, reservation.num_requests), (TOKENS, reservation.num_tokens)):
                self._reserved[reservation.key.name, what] -= count
                if not is_refused:
                    self._count(reservation.key, what, count)
            reservation.num_requests = reservation.num_tokens = 0

    def end(self, reservation: Reservation, num_generated: int) -> None:
        """Count the tokens of an answer that has ended. Idempotent."""
        self.settle(reservation, is_refused=True)
        with self._lock:
            if reservation.is_running:
                reservation.is_running = False
                self._running[reservation.key.name] -= 1
                self._count(reservation.key, TOKENS, num_generated)

    def headers(self, key: ApiKey) -> Mapping[str, str]:
        """OpenAI's x-ratelimit headers for this key's limits."""
        found = {}
        with self._lock:
            for what in (REQUESTS, TOKENS):
                if (window := self._window(key, what)) is not None:
                    found[f"x-ratelimit-limit-{what}"] = str(window.limit)
                    found[f"x-ratelimit-remaining-{what}"] = str(window.remaining)
                    found[f"x-ratelimit-reset-{what}"] = f"{window.reset_s:.3f}s"
        return found

    def _check_room(self, key: ApiKey, what: str, count: int) -> None:
        """Raise RateLimitedError if the key has less than `count` left in this minute."""
        window = self._window(key, what)
        if window is not None and window.remaining < count:
            retry_after = max(1, ceil(window.reset_s))
            raise RateLimitedError(
                f"the key {key.name} has {window.remaining} of its {window.limit} {what} of this minute left and needs "
                f"{count}; try again in {retry_after} s",
                retry_after=retry_after,
            )

    def _count(self, key: ApiKey, what: str, count: int) -> None:
        limit = _limit(key, what)
        if limit is not None and count:
            self._limiters[what].hit(RateLimitItemPerMinute(limit), key.name, what, cost=count)

    def _window(self, key: ApiKey, what: str) -> _Window | None:
        if (limit := _limit(key, what)) is None:
            return None
        stats = self._limiters[what].get_window_stats(RateLimitItemPerMinute(limit), key.name, what)
        remaining = max(0, stats.remaining - self._reserved[key.name, what])
        is_used = stats.remaining < limit
        return _Window(limit, remaining, max(0.0, stats.reset_time - time.time()) if is_used else 0.0)


def _limit(key: ApiKey, what: str) -> int | None:
    return key.requests_per_minute if what == REQUESTS else key.tokens_per_minute
