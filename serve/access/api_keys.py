"""API keys: a file of hashes, and the check of a key that a client sends. Knows nothing of HTTP.

A line of the file is `NAME SHA256`, followed by any of `requests-per-minute=N`, `tokens-per-minute=N`,
`requests-at-once=N`, `priority=N` and `metrics`; `#` begins a comment. A key has 256 random bits, so its plain SHA-256
cannot be reversed by guessing. A slow password hash would only slow the server down.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.core import MAX_PRIORITY
from runtime.errors import InvalidSetting

PREFIX = "hr-"
KEY_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
# The field of ApiKey, the lowest and the highest value, by the word in the file.
LIMITS = {
    "requests-per-minute": ("requests_per_minute", 1, 2**31),
    "tokens-per-minute": ("tokens_per_minute", 1, 2**31),
    "requests-at-once": ("requests_at_once", 1, 2**31),
    "priority": ("priority", -MAX_PRIORITY, MAX_PRIORITY),
}
INTEGER = re.compile("-?[0-9]{1,10}")
METRICS = "metrics"
"""The word that lets a key read the metrics of all keys, which reveal lengths of other keys' prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """Who may call the server, and how much. The name stands in logs and limits, and separates prefix caches."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_at_once: int | None = None
    priority: int | None = None
    """The most urgent (lowest) priority that its requests may ask for; None: the server's --priority."""
    may_read_metrics: bool = False

    def to_line(self) -> str:
        """The key's line in the file."""
        limits = [
            f"{word}={value}" for word, (name, _, _) in LIMITS.items() if (value := getattr(self, name)) is not None
        ]
        return " ".join([self.name, self.sha256, *limits, *([METRICS] if self.may_read_metrics else [])])


class KeyRing:
    """The keys of one file. Without keys, nobody may call."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]

    def __contains__(self, key: ApiKey) -> bool:
        """Whether a key of an older ring is still valid."""
        return any(known.name == key.name and known.sha256 == key.sha256 for _, known in self._keys)

    def find(self, presented: str) -> ApiKey | None:
        """The key that a client sent, or None. Takes constant time: every hash is compared."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found


def new_key() -> str:
    """A new random key."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def make_key(name: str, secret: str, *, may_read_metrics: bool = False, **limits: int | None) -> ApiKey:
    """The entry of a new key. Raises InvalidSetting for an invalid name."""
    if not NAME.fullmatch(name):
        raise InvalidSetting(f"a key's name is 1 to 64 letters, digits or . _ @ -, got {name!r}")
    sha256 = hashlib.sha256(secret.encode()).hexdigest()
    return ApiKey(name=name, sha256=sha256, may_read_metrics=may_read_metrics, **limits)


def read_keys(path: Path) -> list[ApiKey]:
    """Every key of a file. Raises InvalidSetting with file and line; also if the file has no keys."""
    keys, problems = reread_keys(path)
    if problems:
        raise InvalidSetting(problems[0])
    if not keys:
        raise InvalidSetting(f"--api-keys {path} has no keys; `headrace key NAME --file {path}` adds one")
    return keys


def reread_keys(path: Path) -> tuple[list[ApiKey], list[str]]:
    """The keys of a file's valid lines, and the errors of the others. For a running server; never raises.

    Only keys in the file are valid, so a typo in one line does not keep a key that was deleted. With a missing or empty
    file nobody may call.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"--api-keys {path} cannot be read: {error}; `headrace key NAME` writes one"]
    keys, problems = [], []
    for number, line in enumerate(lines, start=1):
        if text := line.partition("#")[0].strip():
            try:
                keys.append(_read_line(text, f"{path}:{number}"))
            except InvalidSetting as error:
                problems.append(str(error))
    return keys, problems


def _read_line(text: str, where: str) -> ApiKey:
    name, *rest = text.split()
    if not NAME.fullmatch(name) or not rest or not re.fullmatch("[0-9a-f]{64}", rest[0]):
        words = " ".join(f"[{word}=N]" for word in LIMITS)
        raise InvalidSetting(f"{where}: a line is NAME SHA256 {words} [{METRICS}]")
    limits: dict[str, int] = {}
    for word in rest[1:]:
        if word == METRICS:
            continue
        limit, _, value = word.partition("=")
        if limit not in LIMITS or not INTEGER.fullmatch(value):
            words = ", ".join(f"{name}=N" for name in LIMITS)
            raise InvalidSetting(f"{where}: {word!r} is not one of {words}, {METRICS}")
        name_of_limit, low, high = LIMITS[limit]
        if not low <= int(value) <= high:
            raise InvalidSetting(f"{where}: {word!r} is not {low} to {high}")
        limits[name_of_limit] = int(value)
    return ApiKey(name=name, sha256=rest[0], may_read_metrics=METRICS in rest, **limits)
