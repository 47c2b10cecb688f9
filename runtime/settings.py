"""Settings as frozen dataclasses, and command-line flags made from them.

A field is written once, with its default and help; `add_flags` turns every field of a class into a flag and
`from_namespace` turns the parsed flags back into an instance, which checks itself when it is made. Used for
`EngineSettings`, for `SamplingParams` and for the server's own settings. Knows nothing about what they mean.
"""

import argparse
import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.errors import InvalidSetting
from runtime.machine.memory import MemoryShare

T = TypeVar("T")

TOOL_FORMAT_NAMES = ("auto", "hermes", "llama3", "json")
_BYTE_UNITS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("KMGT", start=1)},
    **{f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)},
}


def setting(default: Any, help_text: str, *, parse: Callable[[str], Any] | None = None, metavar: str = "") -> Any:
    """A dataclass field that becomes a flag. `parse` reads its text where the type alone does not say how."""
    return field(default=default, metadata={"help": help_text, "parse": parse, "metavar": metavar})


def parse_bytes(text: str) -> int:
    """Read a size in bytes: 500000000, 500MB, 4G (powers of 1000), 4GiB (powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _BYTE_UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 500MB, 4G or 4GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Limits of the engine. Raises InvalidSetting for a value out of range."""

    device: str = setting("auto", "what runs the model")  # runtime/backends/registry.py knows the values and the flag
    max_batch: int = setting(32, "most requests decoded together, at any length")
    max_waiting: int = setting(64, "most requests waiting for a slot; more are refused")
    max_queue_wait: float | None = setting(None, "seconds a request may wait for a slot before it fails")
    request_timeout: float | None = setting(None, "seconds after which a request fails; a request can ask for less")
    ttft: int = setting(1000, "milliseconds to a prompt's first token; where it would be later, streams wait longer")
    tpot: int = setting(200, "milliseconds between two tokens of a stream that prompts may take up with its own step")
    prefill_chunk: int | None = setting(
        None, "most prompt tokens run between two decode steps, by default what --ttft and --tpot leave time for"
    )
    threads: int | None = setting(
        None, "threads of the model, by default one per core, or as many as a container's limits leave"
    )
    kv_memory: int | None = setting(
        None,
        "memory for KV cache and prefix cache, by default 60 %% of what is free",
        parse=parse_bytes,
        metavar="SIZE",
    )
    prefix_cache: int | None = setting(
        None,
        "memory for prompt beginnings that later prompts reuse, by default 10 %% of what is free; 0: none",
        parse=parse_bytes,
        metavar="SIZE",
    )
    speculate: bool = setting(False, "draft next tokens from the text so far and verify them together, where it pays")
    draft: str | None = setting(
        None,
        "artifact of a smaller draft model with the same tokens; implies --speculate",
        metavar="ARTIFACT",
    )
    max_len: int | None = setting(None, "most tokens of prompt and answer together, by default the model's limit")
    tool_format: str = setting(
        "auto", "how tool calls are written: auto (as the chat template says), hermes, llama3, json"
    )

    trust_special_tokens: bool = setting(
        False, "let the text of a control token, like <|im_end|>, be that token in messages and tools as well"
    )

    def __post_init__(self) -> None:
        check_at_least("max_batch", self.max_batch, 1)
        check_at_least("max_waiting", self.max_waiting, 0)
        check_at_least("max_queue_wait", self.max_queue_wait, 0)
        check_at_least("request_timeout", self.request_timeout, 0)
        check_at_least("ttft", self.ttft, 1)
        check_at_least("tpot", self.tpot, 1)
        check_at_least("prefill_chunk", self.prefill_chunk, 1)
        check_at_least("threads", self.threads, 1)
        check_at_least("kv_memory", self.kv_memory, 1)
        check_at_least("prefix_cache", self.prefix_cache, 0)
        # One token of prompt and one of answer.
        check_at_least("max_len", self.max_len, 2)
        if self.tool_format not in TOOL_FORMAT_NAMES:
            raise InvalidSetting(
                f"--tool-format must be one of {', '.join(TOOL_FORMAT_NAMES)}, got {self.tool_format!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSettings(EngineSettings):
    """Settings of one of several models in a process, with its share of their memory; no flag."""

    share: MemoryShare

    @classmethod
    def of(cls, settings: EngineSettings, share: MemoryShare) -> "SharedSettings":
        """The same settings, for a model beside others."""
        return cls(**{item.name: getattr(settings, item.name) for item in fields(settings)}, share=share)


def share_of(settings: EngineSettings) -> MemoryShare | None:
    """A model's share; None where it is alone."""
    return settings.share if isinstance(settings, SharedSettings) else None


def check_at_least(name: str, value: float | None, low: float) -> None:
    """Raise InvalidSetting, naming the flag, if a value that is set is below its lower bound."""
    if value is not None and value < low:
        raise InvalidSetting(f"{flag_name(name)} must be at least {low}, got {value}")


def flag_name(name: str) -> str:
    """The flag of a field: max_len -> --max-len."""
    return "--" + name.replace("_", "-")


def add_flags(
    parser: argparse._ActionsContainer,
    cls: type[Any],
    *,
    skip: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add one flag for each field of the dataclass `cls`, except those in `skip`.

    `defaults` replaces the class's default for single fields. Field types: int, float, str, Path, bool, `X |
    None`, tuple or frozenset of those (the flag may be repeated), and Mapping[int, float] (`ID=VALUE`,
    repeated).
    """
    hints = get_type_hints(cls)
    for item in fields(cls):
        if item.name not in skip:
            default = (defaults or {}).get(item.name, _default(item))
            _add_flag(parser, item, hints[item.name], default)


def from_namespace(cls: type[T], namespace: argparse.Namespace, **fixed: Any) -> T:
    """Make `cls` from parsed flags and `fixed` values; fields with neither keep their default.

    Raises what the class raises for a bad value (InvalidSetting, InvalidRequest).
    """
    given = vars(namespace)
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]  # mypy cannot bound T by "is a dataclass"
        if item.name in given:
            values[item.name] = _collected(given[item.name], hints[item.name])
    return cls(**(values | fixed))


def _default(item: "Field[Any]") -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None


def _add_flag(parser: argparse._ActionsContainer, item: "Field[Any]", hint: Any, default: Any) -> None:
    meta = item.metadata
    text = meta.get("help", "")
    kind = _plain(hint)
    if kind is bool:
        action = argparse.BooleanOptionalAction if default else "store_true"
        parser.add_argument(flag_name(item.name), action=action, default=default, help=text)
        return
    if default not in (None, "", (), frozenset(), {}):
        text += f" (default: {default})"
    options: dict[str, Any] = {"help": text, "metavar": meta.get("metavar") or None}
    if get_origin(kind) in _COLLECTIONS:
        # No default here: argparse would append to it.
        options |= {"action": "append", "type": meta.get("parse") or _element_parser(kind), "default": None}
    else:
        options |= {"type": meta.get("parse") or kind, "default": default}
    parser.add_argument(flag_name(item.name), **options)


_COLLECTIONS: Mapping[Any, Callable[[Any], Any]] = {
    tuple: tuple,
    frozenset: frozenset,
    Mapping: dict,
}
# typing reports Mapping[...]'s origin as collections.abc.Mapping, which is the name imported here.


def _plain(hint: Any) -> Any:
    """int for `int | None`; anything else as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _element_parser(kind: Any) -> Callable[[str], Any]:
    if get_origin(kind) is Mapping:
        return _parse_pair
    parser: Callable[[str], Any] = get_args(kind)[0]
    return parser


def _parse_pair(text: str) -> tuple[int, float]:
    left, _, right = text.partition("=")
    try:
        return int(left), float(right)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, such as 42=-1.5") from error


def _collected(value: Any, hint: Any) -> Any:
    make = _COLLECTIONS.get(get_origin(_plain(hint)))
    if make is None or isinstance(value, make if isinstance(make, type) else object):
        return value
    return make(value or ())
