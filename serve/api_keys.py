"""API keys: a file of hashes, and the check of what a client presents. Knows nothing of HTTP.

A line of the file is `NAME SHA256 [requests-per-minute=N] [tokens-per-minute=N]`; `#` begins a comment. A key
is 256 random bits, so a plain SHA-256 of it cannot be reversed by guessing, and a slow password hash would
only slow the server down.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidSetting

PREFIX = "hr-"
KEY_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
LIMITS = {"requests-per-minute": "requests_per_minute", "tokens-per-minute": "tokens_per_minute"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """Who may call the server, and how much. The name is what logs and limits know, and the tenant's salt."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def to_line(self) -> str:
        """The line of the file."""
        limits = [f"{word}={value}" for word, name in LIMITS.items() if (value := getattr(self, name)) is not None]
        return " ".join([self.name, self.sha256, *limits])


class KeyRing:
    """The keys of one file."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]

    def find(self, presented: str) -> ApiKey | None:
        """The key that was presented. Takes as long whatever is presented: every hash is compared, in constant time."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found


def new_key() -> str:
    """A key nobody can guess."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def make_key(name: str, secret: str, **limits: int | None) -> ApiKey:
    """The entry of a new key. Raises InvalidSetting for a name that does not fit in the file."""
    if not NAME.fullmatch(name):
        raise InvalidSetting(f"a key's name is 1 to 64 letters, digits or . _ @ -, got {name!r}")
    return ApiKey(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), **limits)


def read_keys(path: Path) -> list[ApiKey]:
    """Every key of a file. Raises InvalidSetting with file and line; a file without keys lets nobody in, so it
    is refused too."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"--api-keys {path} cannot be read: {error}; `headrace key NAME` writes one") from error
    keys = [
        _read_line(text, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if (text := line.partition("#")[0].strip())
    ]
    if not keys:
        raise InvalidSetting(f"--api-keys {path} has no keys; `headrace key NAME --file {path}` adds one")
    return keys


def _read_line(text: str, where: str) -> ApiKey:
    name, *rest = text.split()
    if not NAME.fullmatch(name) or not rest or not re.fullmatch("[0-9a-f]{64}", rest[0]):
        raise InvalidSetting(f"{where}: a line is NAME SHA256 [requests-per-minute=N] [tokens-per-minute=N]")
    limits: dict[str, int] = {}
    for word in rest[1:]:
        limit, _, value = word.partition("=")
        if limit not in LIMITS or not value.isascii() or not value.isdigit() or int(value) < 1:
            raise InvalidSetting(f"{where}: {word!r} is not one of {', '.join(f'{name}=N' for name in LIMITS)}")
        limits[LIMITS[limit]] = int(value)
    return ApiKey(name=name, sha256=rest[0], **limits)
