"""Resolves each `$ref` of a JSON schema within the one document of the request.

Pointers (`#/$defs/a`, `#/properties/x`), `$id` and draft 4's `id`, `$anchor`. Nothing is fetched. Knows nothing of what
schemas mean. See https://json-schema.org/draft/2020-12/json-schema-core, sections 8 and 9.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

MAX_PLACE_CHARS = 200
MAX_SEEN = 100_000
"""Most objects and lists that are searched for identifiers."""
ANCHORS = frozenset(("$anchor", "$dynamicAnchor", "$id", "id"))  # `id: "#name"` is draft 4's anchor


class Place(NamedTuple):
    """A place in a document: the place that contains it, and its name or index there."""

    outer: "Place | None"
    name: str | int

    def inside(self, *names: str | int) -> "Place":
        """A place further in. Takes constant time for a path of any length."""
        place = self
        for name in names:
            place = Place(place, name)
        return place

    def pointer(self) -> str:
        """The JSON pointer (RFC 6901), cut in its middle if it is long."""
        names: list[str] = []
        place: Place | None = self
        while place is not None and place.outer is not None:
            names.append(str(place.name)[:MAX_PLACE_CHARS].replace("~", "~0").replace("/", "~1"))
            place = place.outer
        text = "".join(f"/{name}" for name in reversed(names))
        half = MAX_PLACE_CHARS // 2
        return text if len(text) <= MAX_PLACE_CHARS else f"{text[:half]}...{text[-half:]}"

    def shown(self) -> str:
        """The pointer in a message, on one line."""
        return json.dumps(self.pointer(), ensure_ascii=False)[1:-1] or "the top"


ROOT = Place(None, "")


class Target(NamedTuple):
    """The target of a reference: the schema, the base URI of its own references, and its place."""

    schema: Any
    base: str
    place: Place


class References:
    """The identifiers of one document."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._found: dict[str, Target] = {}
        for target in _named(Target(document, "", ROOT)) if isinstance(document, dict) else ():
            schema = target.schema
            self._found.setdefault(target.base, target)
            for keyword in ANCHORS:
                name = schema.get(keyword)
                if isinstance(name, str) and (keyword.endswith("nchor") or name.startswith("#")):
                    self._found.setdefault(f"{target.base}#{name.removeprefix('#')}", target)
        self.base = base_of(document, "")

    def resolve(self, reference: str, base: str) -> Target | None:
        """The target of `reference` from a schema with base URI `base`; None if it is not in the document."""
        try:  # urljoin does not know what a fragment is relative to where the base is a URN
            uri, fragment = urldefrag(base + reference if reference.startswith("#") else urljoin(base, reference))
        except ValueError:  # a host in brackets that is no IPv6 address
            return None
        known = self._found.get(f"{uri}#{fragment}") if fragment and not fragment.startswith("/") else None
        start = self._found.get(uri)
        if known is None and start is not None:
            known = _follow(start, fragment)
        if known is None and reference.startswith("#"):
            # Bundled schemas keep their own `$id`, and refer to definitions of the whole document.
            known = _follow(Target(self._document, self.base, ROOT), reference[1:])
        return known


def base_of(schema: Any, base: str) -> str:
    """The base URI inside `schema`, which itself has the base `base`."""
    if not isinstance(schema, dict):
        return base
    found = schema.get("$id", schema.get("id"))
    if not isinstance(found, str) or found.startswith("#"):
        return base
    try:
        return urldefrag(urljoin(base, found)).url
    except ValueError:
        return base


def _named(root: Target) -> Iterator[Target]:
    """The document, and every object in it that has an identifier or an anchor."""
    pending = [root]
    num_seen = 0
    while pending and num_seen < MAX_SEEN:
        item = pending.pop()
        num_seen += 1
        if isinstance(item.schema, dict):
            base = base_of(item.schema, item.base)
            if item is root or base != item.base or not ANCHORS.isdisjoint(item.schema):
                yield Target(item.schema, base, item.place)
            inner: Iterable[tuple[str | int, Any]] = reversed(item.schema.items())
        else:
            base, inner = item.base, enumerate(item.schema)
        for name, value in inner:
            if isinstance(value, dict | list):
                pending.append(Target(value, base, item.place.inside(name)))


def _follow(start: Target, pointer: str) -> Target | None:
    """The target of a JSON pointer, whose names may be percent-encoded."""
    if pointer in ("", "/"):
        return start
    if not pointer.startswith("/"):
        return None
    target = start
    for part in pointer[1:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        found = _step(target, name) or _step(target, unquote(name))
        if found is None:
            return None
        target = found
    return target


def _step(target: Target, name: str) -> Target | None:
    schema, place = target.schema, target.place.inside(name)
    if isinstance(schema, dict) and name in schema:
        return Target(schema[name], base_of(schema[name], target.base), place)
    if isinstance(schema, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(schema):
        return Target(schema[int(name[:9])], target.base, place)
    return None
