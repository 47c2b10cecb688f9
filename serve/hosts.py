"""Who can reach the server: whether its address is loopback, which names it answers to, which origins may use it.

A server on a loopback address without API keys trusts everybody on the machine. A web page from elsewhere can get that
trust by pointing its own name to 127.0.0.1 while it is open (DNS rebinding): for the browser, page and server then have
one origin. The browser still sends the page's name in `Host`, so the server refuses names that are not its own. Knows
nothing of Flask.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from runtime.errors import HeadraceError, InvalidSetting

ANY = "*"
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{0,5})?")
"""`Host` as in RFC 9110: a name or an address, with brackets around IPv6, and perhaps a port."""
DEFAULT_PORTS = {"http": 80, "https": 443}


class ForeignHostError(HeadraceError):
    """The request's Host is not one of this server's names."""


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, can be reached from this machine only. False if it has no address."""
    try:
        address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0]
    except (OSError, UnicodeError):
        return False
    return _is_loopback_address(str(address))


def check_exposure(host: str, *, has_keys: bool, allow_anonymous: bool) -> None:
    """Raise InvalidSetting if other machines could call without a key and --allow-anonymous is not set."""
    if not (has_keys or allow_anonymous or is_loopback(host)):
        raise InvalidSetting(
            f"--host {host} can be reached from other machines, and without --api-keys anybody there may call: give "
            "--api-keys FILE (`headrace key NAME` writes one), or --allow-anonymous if you want that"
        )


class HostRule:
    """Which values of `Host` a server that is bound to `bound_host` answers to.

    On a loopback address: localhost, loopback addresses, the bound name, and the names in `allowed`. On any other
    address also every IP address: rebinding cannot put one into `Host`, and health checks use them.
    """

    def __init__(self, bound_host: str, allowed: tuple[str, ...] = ()) -> None:
        self._names = {"localhost", *map(plain_name, (bound_host, *allowed))}
        self._is_loopback = is_loopback(bound_host)
        self._is_asked_for = bool(allowed)

    def check(self, host: str | None, *, has_keys: bool) -> None:
        """Raise ForeignHostError for a name that is not the server's. None (no `Host`) is valid: browsers send one.

        Without --allowed-host, only a loopback address without keys is guarded. On other addresses the server cannot
        know its names, and where there are keys, a web page without one gets nothing.
        """
        is_guarded = self._is_asked_for or (self._is_loopback and not has_keys)
        if not is_guarded or host is None or ANY in self._names:
            return
        match = HOST.fullmatch(host)
        name = plain_name(match[1]) if match else ""
        if not match or not (name in self._names or self._is_own_address(name)):
            raise ForeignHostError(
                f"this server does not answer to the Host {host[:100]!a}; "
                "call it as localhost or 127.0.0.1, or start it with --allowed-host NAME"
            )

    def _is_own_address(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return not self._is_loopback or _is_loopback_address(name)


def plain_name(host: str) -> str:
    """A name or address in lower case, without brackets and without the final dot of a full domain name."""
    return host.strip("[]").lower().removesuffix(".")


def check_allowed_host(host: str) -> None:
    """Raise InvalidSetting if a value of `--allowed-host` is not a name without scheme and port, or `*`."""
    if host != ANY and (not (match := HOST.fullmatch(host)) or match[1] != host):
        raise InvalidSetting(f"--allowed-host must be a name like gpu.example, without a port, or *, got {host!r}")


def plain_origin(origin: str) -> str:
    """An origin as browsers write it: lower case, no default port. Raises InvalidSetting if it is not one.

    Wildcards are refused: a loosely matched pattern lets in pages that nobody meant.
    """
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    match = HOST.fullmatch(parts.netloc)
    is_whole = origin.lower() == f"{parts.scheme}://{parts.netloc}".lower()
    if parts.scheme not in DEFAULT_PORTS or match is None or not is_whole:
        raise InvalidSetting(
            f"--cors-origin must be a whole origin like https://chat.example or http://[::1]:3000, or *; got {origin!r}"
        )
    shown_port = "" if port in (None, DEFAULT_PORTS[parts.scheme]) else f":{port}"
    return f"{parts.scheme}://{match[1].lower()}{shown_port}"


def _is_loopback_address(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)
