"""Who can reach the server: whether its address is loopback, the names it answers to, the origins it shares with.

A server on a loopback address without API keys trusts everybody on the machine. A web page of elsewhere becomes
one of them if its name is made to point to 127.0.0.1 while it is open (DNS rebinding): to the browser the page and
this server are then one origin. The browser still sends that name in `Host`, so names that are not ours are refused.
Knows nothing of Flask.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from runtime.errors import HeadraceError, InvalidSetting

ANY = "*"
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{0,5})?")
"""`Host` as RFC 9110 has it: a name or an address, brackets around IPv6, perhaps a port."""
DEFAULT_PORTS = {"http": 80, "https": 443}


class ForeignHostError(HeadraceError):
    """The request's Host is not one of this server's names."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`, an address or a name. False if it has no address."""
    try:
        address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0]
    except (OSError, UnicodeError):
        return False
    return _is_loopback_address(str(address))


def check_exposure(host: str, *, has_keys: bool, allow_anonymous: bool) -> None:
    """Raise InvalidSetting if other machines could call without a key and nobody said that they may."""
    if not (has_keys or allow_anonymous or is_loopback(host)):
        raise InvalidSetting(
            f"--host {host} can be reached from other machines, and without --api-keys everybody there "
            "may call: give --api-keys FILE (`headrace key NAME` writes one), or --allow-anonymous if that is meant"
        )


class HostRule:
    """Which values of `Host` are answered, on a server that is bound to `bound_host`.

    A loopback address answers to localhost, to loopback addresses and to the name it was bound by; `allowed` are
    further names. One bound beyond loopback answers to every IP address too: no rebinding can put one into `Host`,
    and health checks come by it.
    """

    def __init__(self, bound_host: str, allowed: tuple[str, ...] = ()) -> None:
        self._names = {"localhost", *map(plain_name, (bound_host, *allowed))}
        self._is_loopback = is_loopback(bound_host)
        self._is_asked_for = bool(allowed)

    def check(self, host: str | None, *, has_keys: bool) -> None:
        """Raise ForeignHostError for a name that is not ours. None, no `Host` at all, comes from no browser.

        Without names that were allowed only a loopback address without keys is guarded: elsewhere the server cannot
        know its names, and a page that has no key gets nothing.
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
    """A name or address without case, brackets and the dot that may end a full domain name."""
    return host.strip("[]").lower().removesuffix(".")


def check_allowed_host(host: str) -> None:
    """Raise InvalidSetting for what is no name: `--allowed-host` takes it without scheme and port."""
    if host != ANY and (not (match := HOST.fullmatch(host)) or match[1] != host):
        raise InvalidSetting(f"--allowed-host must be a name like gpu.example, without a port, or *, got {host!r}")


def plain_origin(origin: str) -> str:
    """An origin as browsers write it: lower case, no default port. Raises InvalidSetting for what is none.

    Wildcards are refused: a server that reads them loosely lets in pages that nobody thought of.
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
