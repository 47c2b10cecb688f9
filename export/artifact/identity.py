"""Decides whether an export may replace what is already at its target.

same source, precision and KV type    replaced
another artifact                      refused, unless the user says --replace
not an artifact                       always refused
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint.config_fields import shown_names
from export.checkpoint.lora.adapter import Lora
from export.schemes.registry import AUTO, IMPORTED, SCHEMES
from export.sources.open import DEFAULT_MODEL
from runtime.artifact.json_shape import read_json
from runtime.artifact.manifest import CHOICE, MANIFEST
from runtime.artifact.plan_files import ENGINES
from runtime.errors import HeadraceError, InvalidSetting

_WEIGHT_SUFFIX = re.compile(r"\.(gguf|safetensors)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The properties that must agree for one export to replace another.

    source: the user's name for the checkpoint, without its path; origin: a hash of that path, None for a hub id
    precision: as asked for, so it may be `auto`
    """

    source: str
    origin: str | None
    precision: str
    has_int8_kv: bool = False

    @property
    def described(self) -> str:
        """For people: `model (w8a16, int8 KV cache)`."""
        return f"{self.source} ({self.precision}{', int8 KV cache' if self.has_int8_kv else ''})"

    def is_same(self, other: "Identity") -> bool:
        """Whether an export with this identity may replace the other."""
        # Older artifacts have no origin.
        is_same_place = None in (self.origin, other.origin) or self.origin == other.origin
        is_same_precision = self.precision == other.precision or (
            self.precision == IMPORTED and other.precision in SCHEMES
        )
        is_same_kv = self.has_int8_kv == other.has_int8_kv
        return self.source == other.source and is_same_place and is_same_precision and is_same_kv


def identity_of(
    model: str, *, revision: str | None, precision: str, has_int8_kv: bool, loras: Sequence[Lora] = ()
) -> Identity:
    """The identity of an export of `model` with adapters merged, as the user wrote it. Reads no checkpoint."""
    path = Path(model).expanduser()
    paths = [lora.path for lora in loras]
    if model == DEFAULT_MODEL or not path.exists():
        source = model if revision is None else f"{model}@{revision}"
    else:
        source = path.resolve().name if path.is_dir() else path.name
        paths.insert(0, path)
    source = "+".join([source, *(lora.name for lora in loras)])
    origin = origin_of(*paths) if paths else None
    return Identity(source=source, origin=origin, precision=precision, has_int8_kv=has_int8_kv)


def origin_of(*paths: Path) -> str:
    """A hash of paths: tells two checkpoints of one name apart without revealing where they are."""
    text = "\n".join(str(path.resolve()) for path in paths)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def default_name(model: str, loras: Sequence[Lora] = ()) -> str:
    """The model's part of the default --out: its last name, lower-case, without the suffix of a weight file.

    Other dots stay, because they tell models apart (Llama-3.2-1B, Llama-3.2-3B). Adapters follow after a `+`.
    """
    path = Path(model).expanduser()
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return "+".join([_WEIGHT_SUFFIX.sub("", name) or name, *(lora.name.replace("*", "x") for lora in loras)]).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """The artifact that is at the target now, as far as its manifest can be read.

    foreign: files in the directory that its manifest does not list
    """

    identity: Identity
    dialects: frozenset[str]
    max_len: int | None
    foreign: Sequence[str]


def present_at(target: Path) -> Present | None:
    """The artifact at `target`; None if there is nothing or an empty directory. InvalidSetting for anything else.

    Artifacts of other releases and damaged ones count, as long as their manifest says what they are.
    """
    try:
        if not target.exists():
            return None
        if not target.is_dir():
            raise InvalidSetting(f"{target} is a file; name another --out")
        names = sorted(entry.name for entry in target.iterdir())
    except OSError as error:
        raise InvalidSetting(f"{target} cannot be read: {error.strerror}; name another --out") from error
    if not names:
        return None
    manifest = _manifest_at(target)
    files = set(manifest["files"])
    return Present(
        identity=Identity(
            source=manifest["source"],
            origin=manifest.get("origin"),
            precision=AUTO if CHOICE in files else manifest["precision"],
            has_int8_kv=_dict_at(manifest, "kv").get("dtype") == "int8",
        ),
        dialects=frozenset(map(str, _dict_at(manifest, "dialects"))),
        max_len=_dict_at(manifest, "dims").get("max_len"),
        foreign=[name for name in names if name not in files | {MANIFEST, ENGINES}],
    )


def check_replaceable(target: Path, wanted: Identity, *, replaces_any: bool = False) -> Present | None:
    """The artifact that an export to `target` would replace; None if there is none.

    InvalidSetting if it is not an artifact; without `replaces_any` also if it has another identity, or contains files
    that no export wrote.
    """
    present = present_at(target)
    if present is None or replaces_any:
        return present
    if not wanted.is_same(present.identity):
        is_namesake = wanted.described == present.identity.described
        other = "of the same name from another place" if is_namesake else f"and not {wanted.described}"
        raise InvalidSetting(
            f"{target} holds {present.identity.described}, {other}; name another --out, or say --replace to delete it"
        )
    if present.foreign:
        raise InvalidSetting(
            f"{target} also holds {shown_names(present.foreign)}, which no export wrote; move that away, "
            "or say --replace to delete it"
        )
    return present


def _manifest_at(target: Path) -> dict[str, Any]:
    """The manifest; InvalidSetting if there is none with the fields that identity needs."""
    refusal = InvalidSetting(
        f"{target} holds something that is not an artifact; name another --out, or empty it yourself"
    )
    try:
        raw = read_json(target / MANIFEST)
    except HeadraceError as error:
        raise refusal from error
    texts = ("source", "precision")
    is_ours = (
        isinstance(raw, dict)
        and isinstance(raw.get("schema_version"), int)
        and all(isinstance(raw.get(name), str) for name in texts)
        and isinstance(raw.get("files"), dict)
    )
    if not is_ours:
        raise refusal
    return dict(raw)


def _dict_at(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    value = manifest.get(name)
    return value if isinstance(value, dict) else {}
