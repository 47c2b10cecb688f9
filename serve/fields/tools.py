"""The fields of tool calling: the functions offered, which of them must be called, and the calls of earlier turns.

Shapes follow https://platform.openai.com/docs/api-reference/chat, and Anthropic's where clients mix the two. A
function's schema is compiled only when a call is forced, by `runtime/grammar/grammar.py`. Knows nothing of HTTP or of
how a model writes calls.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from runtime.core import Constraint, ConstraintKind, LateCheck
from runtime.errors import InvalidRequest, UnsupportedField
from runtime.grammar.schema.translation import TranslatedSchema, translate_schema
from runtime.text.tools.call_or_answer import calls_or
from runtime.text.tools.formats import Tool, ToolFormat, calls_grammar
from serve.fields.checks import (
    Json,
    MismatchError,
    any_object,
    boolean,
    check_utf8,
    described,
    list_of,
    one_of,
    schema_of,
    shown,
    string,
    text_up_to,
)
from serve.fields.foreign import CALL, CALLED, CHOICE, FUNCTION, TOOL, table
from serve.fields.reading import Field, at_path, check_value, fields_of, object_of, read_fields, table_schema

MAX_TOOLS = 128
"""OpenAI's limit."""
MAX_CALLS = 128
NAME = re.compile(r"[a-zA-Z0-9_./:@$-]{1,128}")
"""Names as MCP clients send them: up to 128 characters, with the server's name before a slash, a colon or a dot."""
MAX_CALLED_NAME = 256
"""For calls of earlier turns, which are only text: models invent names, and other servers allow more."""
OBJECT_TYPES = (None, "object", ["object"], ["object", "null"], ["null", "object"])
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools that the model may call. It must call one of `forced`; if that is empty, the model decides."""

    tools: tuple[Tool, ...]
    forced: tuple[Tool, ...]
    is_parallel: bool

    def constraint(self, form: ToolFormat, answer: Constraint | None) -> Constraint | None:
        """The constraint on the answer: calls if they are forced, else calls or the form `answer`. None: any text."""
        if not self.forced and answer is None:
            return None
        tools, checks = self._compilable(self.forced or self.tools)
        if self.forced or answer is None:
            source = calls_grammar(form, tools, is_parallel=self.is_parallel)
            return Constraint(ConstraintKind.GRAMMAR, source, "tools", late_checks=checks)
        with_calls = calls_or(answer, form, tools, is_parallel=self.is_parallel)
        return replace(with_calls, late_checks=(*answer.late_checks, *checks))

    def _compilable(self, tools: Sequence[Tool]) -> tuple[list[Tool], tuple[LateCheck, ...]]:
        """The tools with the part of their schemas that a grammar can enforce, and the checks for the rest."""
        translated = [_translated(self.tools.index(tool), tool) for tool in tools]
        checks = tuple(check for found in translated for check in found.late_checks)
        return [replace(tool, compiled=found.source) for tool, found in zip(tools, translated, strict=True)], checks


def _translated(idx: int, tool: Tool) -> TranslatedSchema:
    """The schema of a tool's arguments. They are always an object, even if the schema allows more."""
    schema = {name: value for name, value in tool.parameters.items() if name != "nullable"} | {"type": "object"}
    param = f"tools[{idx}].function.parameters"
    return translate_schema(schema, param=param, is_strict=tool.is_strict, tool=tool.name)


@described(type="string", pattern=f"^{NAME.pattern}$")
def _name(value: Any) -> str:
    if not NAME.fullmatch(string(value)):
        raise MismatchError("1 to 128 letters, digits and characters of _ . / : @ $ -")
    return str(value)


@described(type="object", description="A JSON schema.")
def _parameters(value: Any) -> Json:
    """A schema of objects."""
    if not isinstance(value, dict) or value.get("type") not in OBJECT_TYPES:
        raise MismatchError('a JSON schema of type "object"')
    check_utf8(value)
    return {"type": "object"} | value | {"type": "object"}


@at_path(type="string")
def _kind(value: Any, path: str) -> str:
    """The `type` of tools, calls and choices: only functions are supported."""
    if string(value) not in ("function", ""):
        raise UnsupportedField(
            f'{path} must be "function" or absent (this server has no tools of its own), got {shown(value)}', param=path
        )
    return str(value)


FUNCTION_FIELDS = table(
    FUNCTION,
    Field("name", _name, is_required=True),
    Field("description", string),
    Field("parameters", _parameters),
    Field("strict", boolean),  # whether forced calls must follow the whole schema
)
TOOL_FIELDS = table(TOOL, Field("type", _kind), Field("function", fields_of(FUNCTION_FIELDS), is_required=True))
_tool = fields_of(TOOL_FIELDS)


@at_path(type="array", items=table_schema(TOOL_FIELDS), maxItems=MAX_TOOLS)
def tools(value: Any, path: str) -> tuple[Tool, ...]:
    """The functions offered. Each name may occur once."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise MismatchError(f"a list of at most {MAX_TOOLS} tools")
    found: dict[str, Tool] = {}
    for idx, item in enumerate(value):
        where = f"{path}[{idx}]"
        function = check_value(item, _tool, where)["function"]
        name = function["name"]
        if name in found:
            raise InvalidRequest(f"{where}.function.name: there are two functions {shown(name)}", param=where)
        found[name] = Tool(
            name=name,
            description=function.get("description", ""),
            parameters=function.get("parameters", NO_PARAMETERS),
            is_strict=function.get("strict", False),
        )
        if found[name].is_strict:
            _translated(idx, found[name])
    return tuple(found.values())


class ToolChoice(NamedTuple):
    """`mode`: none, auto or required. `names`: the functions that may be called; None: all of them."""

    mode: str
    names: tuple[str, ...] | None = None
    is_single: bool = False
    """Whether the choice names one function, which is then called once."""


CHOICE_WORDS = one_of("none", "auto", "required", "any")
ALLOWED_FIELDS = (
    Field("mode", one_of("auto", "required", "any")),
    Field("tools", list_of(any_object, "tools", max_len=MAX_TOOLS), is_required=True),
)
CHOICE_FIELDS = table(
    CHOICE,
    Field("type", string, is_required=True),
    Field("function", any_object),
    Field("name", _name),
    Field("allowed_tools", any_object),
    Field("mode", one_of("auto", "required", "any")),
    Field("tools", list_of(any_object, "tools", max_len=MAX_TOOLS)),
)
CHOSEN_FIELDS = (Field("name", _name, is_required=True),)
NAMED_FIELDS = (Field("type", _kind), Field("function", fields_of(CHOSEN_FIELDS)), Field("name", _name))


@at_path(anyOf=[schema_of(CHOICE_WORDS), table_schema(CHOICE_FIELDS)])
def tool_choice(value: Any, path: str) -> ToolChoice:
    """A word, alone or as an object's `type`; a function; or `allowed_tools`, some of the functions."""
    if not isinstance(value, dict):
        try:
            return _word(CHOICE_WORDS(value))
        except MismatchError as mismatch:
            raise MismatchError(f"{mismatch}, or an object that names a function") from None
    found = read_fields(value, CHOICE_FIELDS, f"{path}.")
    kind = found["type"]
    if kind in ("none", "auto", "required", "any"):
        return _word(kind)
    if kind == "allowed_tools":
        where, allowed = path, found
        if "allowed_tools" in found:
            where = f"{path}.allowed_tools"
            allowed = read_fields(found["allowed_tools"], ALLOWED_FIELDS, f"{where}.")
        names = tuple(_named(tool, f"{where}.tools[{idx}]") for idx, tool in enumerate(allowed.get("tools", ())))
        if not names:
            raise InvalidRequest(f"{where}.tools must name at least one function", param=path)
        return ToolChoice(_word(allowed.get("mode", "auto")).mode, names)
    if kind == "tool":
        kind = "function"
    return ToolChoice("required", (_named({**value, "type": kind}, path),), is_single=True)


def _word(word: str) -> ToolChoice:
    """`any` is how Anthropic and Mistral say `required`."""
    return ToolChoice("required" if word == "any" else word)


def _named(value: Mapping[str, Any], path: str) -> str:
    """The name of a function: inside `function`, or beside `type` as in OpenAI's Responses and Anthropic's API."""
    known = {row.name for row in NAMED_FIELDS}
    found = read_fields({key: value[key] for key in value if key in known}, NAMED_FIELDS, f"{path}.")
    if "function" not in found and "name" not in found:
        raise InvalidRequest(f"{path}.function is required", param=f"{path}.function")
    return str(found.get("function", found)["name"])


TOOL_USE_FIELDS = (
    Field("tools", tools),
    Field("tool_choice", tool_choice),
    Field("parallel_tool_calls", boolean),
)


def wanted_tools(values: Mapping[str, Any]) -> ToolUse | None:
    """The tools of a request's checked fields; None if no tool may be called. Raises InvalidRequest."""
    offered: tuple[Tool, ...] = values.get("tools", ())
    choice: ToolChoice = values.get("tool_choice", ToolChoice("auto"))
    if not offered:
        if choice.mode == "required" or choice.names is not None:
            raise InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")
        return None
    if choice.mode == "none":
        return None
    chosen = tuple(tool for tool in offered if choice.names is None or tool.name in choice.names)
    if unknown := set(choice.names or ()) - {tool.name for tool in chosen}:
        names = ", ".join(tool.name for tool in offered)
        raise InvalidRequest(f"tool_choice names {shown(min(unknown))}, the tools are {names}", param="tool_choice")
    is_parallel = values.get("parallel_tool_calls", True) and not choice.is_single
    # If the choice names one function, the prompt describes all of them; with allowed_tools only the allowed ones.
    told = offered if choice.is_single else chosen
    return ToolUse(tools=told, forced=chosen if choice.mode == "required" else (), is_parallel=is_parallel)


@described(type=["string", "object"], description="A JSON object, or one as text; text that is not JSON stays text.")
def _arguments(value: Any) -> Json | str:
    """Chat templates want an object. OpenAI's clients send it as JSON text, and models write that with mistakes."""
    if isinstance(value, dict):
        check_utf8(value)
        return value
    text = string(value)
    try:
        parsed = json.loads(text.strip() or "{}")
    except (ValueError, RecursionError):
        return str(text)
    if not isinstance(parsed, dict | None):
        raise MismatchError("a JSON object, as text")
    try:
        check_utf8(parsed)
    except MismatchError:
        return str(text)  # a model may write half a surrogate pair
    return parsed or {}


CALLED_FIELDS = table(
    CALLED, Field("name", text_up_to(MAX_CALLED_NAME), is_required=True), Field("arguments", _arguments)
)


@object_of(CALLED_FIELDS)
def called_function(found: Json, _: str) -> Json:
    """The function of a call of an earlier turn."""
    return {"name": found["name"], "arguments": found.get("arguments", {})}


CALL_FIELDS = table(
    CALL, Field("id", string), Field("type", _kind), Field("function", called_function, is_required=True)
)
_call = fields_of(CALL_FIELDS)


@at_path(type="array", items=table_schema(CALL_FIELDS), maxItems=MAX_CALLS)
def calls(value: Any, path: str) -> list[Json]:
    """The calls of an earlier turn, with their arguments as objects, or as text if that is not JSON."""
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise MismatchError(f"a list of at most {MAX_CALLS} calls")
    return [check_value(item, _call, f"{path}[{idx}]") for idx, item in enumerate(value)]


def objects_for_text(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The messages with text arguments wrapped into objects, for chat templates that accept nothing else."""
    wrapped = []
    for message in messages:
        calls = [
            call | {"function": call["function"] | {"arguments": {"_raw": call["function"]["arguments"]}}}
            if isinstance(call["function"]["arguments"], str)
            else call
            for call in message.get("tool_calls", ())
        ]
        wrapped.append({**message, **({"tool_calls": calls} if calls else {})})
    return wrapped
