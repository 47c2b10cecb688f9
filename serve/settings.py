"""Settings of the HTTP server; each field is a flag of `headrace serve`."""

from dataclasses import dataclass

from runtime.errors import InvalidSetting
from runtime.settings import check_at_least, parse_bytes, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Address and limits of the server. Raises InvalidSetting for a value out of range."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every one (no access control)")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    drain_timeout: float = setting(30.0, "seconds running requests get to finish after SIGTERM or SIGINT")
    max_body: int = setting(4 * 2**20, "largest request body in bytes", parse=parse_bytes, metavar="SIZE")
    max_choices: int = setting(32, "most choices (prompts times n) in a request, at most --max-waiting")
    access_log: bool = setting(False, "write a line per request to standard output")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidSetting(f"--port must be 0 to 65535, got {self.port}")
        # Up to a day: gunicorn wants whole seconds that fit its clock.
        if not 0 <= self.drain_timeout <= 86_400:
            raise InvalidSetting(f"--drain-timeout must be 0 to 86400 seconds, got {self.drain_timeout}")
        check_at_least("max_body", self.max_body, 1)
        check_at_least("max_choices", self.max_choices, 1)
