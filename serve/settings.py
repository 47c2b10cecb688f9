"""Settings of the HTTP server; each field is a flag of `headrace serve`."""

from dataclasses import dataclass

from runtime.core import MAX_PRIORITY
from runtime.errors import InvalidSetting
from runtime.settings import check_at_least, parse_bytes, setting
from serve.hosts import ANY, check_allowed_host, plain_origin

LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Address and limits of the server. Raises InvalidSetting for a value out of range."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 means all addresses and needs --api-keys")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    api_keys: str | None = setting(None, "file of hashed keys that `headrace key` writes", metavar="FILE")
    priority: int = setting(
        0, "most urgent priority that a request may ask for, -100 to 100, unless its key has its own limit"
    )
    allow_anonymous: bool = setting(False, "allow other machines to call without --api-keys")
    allowed_host: tuple[str, ...] = setting(
        (),
        "another name for this server in clients' Host header, or * for any; may be repeated",
        metavar="NAME",
    )
    cors_origin: tuple[str, ...] = setting(
        (), "origin whose web pages may call this server, like https://chat.example; may be repeated", metavar="ORIGIN"
    )
    exit_on_failure: bool = setting(
        False, "exit with code 70 when an engine fails, so that a supervisor can restart the server"
    )
    alias: tuple[str, ...] = setting(
        (), "another name for the first model, or NAME=MODEL for another model; may be repeated", metavar="NAME"
    )
    any_model_name: bool = setting(False, "use the first model for requests with an unknown model name, or without one")
    strict_fields: bool = setting(False, "refuse request fields that are in no table of known fields")
    drain_timeout: float = setting(30.0, "seconds that running requests get to finish after SIGTERM or SIGINT")
    read_timeout: float = setting(20.0, "seconds that a client gets to send its whole request")
    write_timeout: float = setting(20.0, "seconds without reading any of its reply until a client counts as gone")
    max_connections: int = setting(4096, "most open connections; the one that is idle longest is closed for a new one")
    max_body: int = setting(4 * 2**20, "largest request body in bytes", parse=parse_bytes, metavar="SIZE")
    max_choices: int = setting(32, "most choices (prompts times n) in a request, at most --max-waiting")
    access_log: bool = setting(False, "write a line for each request to standard output, without prompts and replies")
    log_prompts: bool = setting(False, "with --access-log: write the request body too")
    otlp_endpoint: str | None = setting(
        None, "OpenTelemetry collector to send traces to, like http://127.0.0.1:4318", metavar="URL"
    )
    log_format: str = setting("text", "text, or json: one JSON object per line")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidSetting(f"--port must be 0 to 65535, got {self.port}")
        if abs(self.priority) > MAX_PRIORITY:
            raise InvalidSetting(f"--priority must be {-MAX_PRIORITY} to {MAX_PRIORITY}, got {self.priority}")
        # At most a day: gunicorn rounds up to whole seconds, which must fit its clock.
        if not 0 <= self.drain_timeout <= 86_400:
            raise InvalidSetting(f"--drain-timeout must be 0 to 86400 seconds, got {self.drain_timeout}")
        for name in ("read_timeout", "write_timeout"):
            check_at_least(name, getattr(self, name), 0.1)
        check_at_least("max_connections", self.max_connections, 16)
        check_at_least("max_body", self.max_body, 1)
        check_at_least("max_choices", self.max_choices, 1)
        if self.log_format not in LOG_FORMATS:
            raise InvalidSetting(f"--log-format must be {' or '.join(LOG_FORMATS)}, got {self.log_format!r}")
        if self.log_prompts and not self.access_log:
            raise InvalidSetting("--log-prompts needs --access-log")
        if self.allow_anonymous and self.api_keys is not None:
            raise InvalidSetting("--allow-anonymous contradicts --api-keys; remove one of them")
        for host in self.allowed_host:
            check_allowed_host(host)
        for origin in self.cors_origin:
            if origin != ANY:
                plain_origin(origin)
