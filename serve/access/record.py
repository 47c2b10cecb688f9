"""The record of one HTTP request, while it is answered and after its end.

Access log, rate limits, traces and /status read the same record, so they agree. serve/access/middleware.py makes a
record for every request. Knows nothing of Flask.
"""

import re
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from serve.access.api_keys import ApiKey
from serve.access.rate_limits import Reservation
from serve.replies.choices import Choices
from serve.replies.unenforced import AnswerChecks

ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""A client's X-Request-Id is echoed and logged, so only harmless characters are accepted."""


def request_id_of(proposed: str | None) -> str:
    """The client's own id if it is valid, else a new one."""
    return proposed if proposed and ACCEPTED_ID.fullmatch(proposed) else uuid.uuid4().hex


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. `arrived_at` is by `time.time`, to be shown; the other times are by `time.monotonic`."""

    request_id: str
    method: str
    route: str
    """The route's rule, not the path: clients may invent paths."""
    peer: str | None = None
    """The address of the connection's other end: the client or a proxy."""
    key: ApiKey | None = None
    model: str | None = None
    choices: Choices | None = None
    reservation: Reservation | None = None
    """The part of its key's limits that the request holds."""
    schema_checks: AnswerChecks | None = None
    body: str | None = None
    ignored: Collection[str] = ()
    """The fields of the body that were ignored."""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """The client's traceparent and tracestate."""
    status: int = 0
    arrived_at: float = field(default_factory=time.time)
    arrived_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def tenant(self) -> str:
        """The owner of the prompt. Cached prefixes are shared only within a tenant."""
        return self.key.name if self.key is not None else ""

    @property
    def num_generated_tokens(self) -> int:
        """The tokens of the answer so far, over all choices."""
        return 0 if self.choices is None else self.choices.num_generated_tokens

    @property
    def seconds(self) -> float:
        """Seconds from arrival to the last byte of the reply, or to now."""
        return (self.ended_s or time.monotonic()) - self.arrived_s

    @property
    def first_token_s(self) -> float | None:
        """Seconds from arrival to the first token; None without one."""
        if self.choices is None or self.choices.first_token_s is None:
            return None
        return self.choices.first_token_s - self.arrived_s
