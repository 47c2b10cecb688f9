"""What is known about one HTTP request while it is answered and when it has ended.

The access log, the rate limits, the traces and the live view read the same record, so that they cannot differ.
Made in serve/access/middleware.py for every request and kept in Flask's `g`; knows nothing of Flask itself.
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
"""A client's X-Request-Id is echoed and logged, so only what can do no harm there is taken over."""


def request_id_of(proposed: str | None) -> str:
    """The client's own id if it is fit to be one, else a new one."""
    return proposed if proposed and ACCEPTED_ID.fullmatch(proposed) else uuid.uuid4().hex


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request. Times are of `time.time` where they are shown and of `time.monotonic` where they are compared."""

    request_id: str
    method: str
    route: str
    """The rule, not the path: paths are the client's to invent."""
    peer: str | None = None
    """The address the connection comes from: the client's, or a proxy's."""
    key: ApiKey | None = None
    model: str | None = None
    choices: Choices | None = None
    reservation: Reservation | None = None
    """What the request holds of its key's limits."""
    schema_checks: AnswerChecks | None = None
    body: str | None = None
    ignored: Collection[str] = ()
    """Fields of the body that were taken without effect."""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """The client's traceparent and tracestate."""
    status: int = 0
    arrived_at: float = field(default_factory=time.time)
    arrived_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def tenant(self) -> str:
        """Whose prompts these are: cached prefixes are shared within a tenant only."""
        return self.key.name if self.key is not None else ""

    @property
    def num_generated_tokens(self) -> int:
        """Tokens of the answer so far, over all choices."""
        return 0 if self.choices is None else self.choices.num_generated_tokens

    @property
    def seconds(self) -> float:
        """From arrival to the last byte of the reply, or to now."""
        return (self.ended_s or time.monotonic()) - self.arrived_s

    @property
    def first_token_s(self) -> float | None:
        """Seconds from arrival to the first token; None without one."""
        if self.choices is None or self.choices.first_token_s is None:
            return None
        return self.choices.first_token_s - self.arrived_s
