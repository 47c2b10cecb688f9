"""The fields of tool calling: functions offered, which of them must be called, and the calls of earlier turns.

Shapes follow https://platform.openai.com/docs/api-reference/chat, and Anthropic's where clients mix them up. Whether a
parameters' schema is any good is found out when a call is forced, by `runtime/grammar/grammar.py`. Knows nothing of
HTTP or of how a model writes calls.
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
from serve.fields.classes import CALL, CALLED, CHOICE, FUNCTION, TOOL, table
from serve.fields.tables import (
    Field,
    MismatchError,
    any_object,
    boolean,
    check_utf8,
    described,
    list_of,
    one_of,
    read_fields,
    schema_of,
    shown,
    string,
    table_schema,
)

MAX_TOOLS = 128
"""OpenAI's limit."""
MAX_CALLS = 128
NAME = re.compile(r"[a-zA-Z0-9_./:@$-]{1,128}")
"""What MCP clients send: names of up to 128 characters, with the server's name before a slash, a colon or a dot."""
MAX_CALLED_NAME = 256
"""Of earlier turns, whose calls are text: models invent names, and other servers allow other ones."""
OR_NULL = (["object", "null"], ["null", "object"])
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Tools that a request lets the model call. `forced`: those of which one has to be called; empty: as it likes."""

    tools: tuple[Tool, ...]
    forced: tuple[Tool, ...]
    is_parallel: bool

    def constraint(self, form: ToolFormat, answer: Constraint | None) -> Constraint | None:
        """What holds the answer to calls, if it has to be calls; to calls or to the form of an `answer`, if it has to
        have one."""
        if not self.forced and answer is None:
            return None
        tools, checks = self._compilable(self.forced or self.tools)
        if self.forced or answer is None:
            source = calls_grammar(form, tools, is_parallel=self.is_parallel)
            return Constraint(ConstraintKind.GRAMMAR, source, "tools", late_checks=checks)
        with_calls = calls_or(answer, form, tools, is_parallel=self.is_parallel)
        return replace(with_calls, late_checks=(*answer.late_checks, *checks))

    def _compilable(self, tools: Sequence[Tool]) -> tuple[list[Tool], tuple[LateCheck, ...]]:
        """The tools with what of their parameters a grammar can hold, and the checks for the rest."""
        translated = [_translated(self.tools.index(tool), tool) for tool in tools]
        checks = tuple(check for found in translated for check in found.late_checks)
        return [replace(tool, compiled=found.source) for tool, found in zip(tools, translated, strict=True)], checks


@described(type="string", pattern=f"^{NAME.pattern}$")
def _name(value: Any) -> str:
    if not NAME.fullmatch(string(value)):
        raise MismatchError("1 to 128 letters, digits and characters of _ . / : @ $ -")
    return str(value)


def _translated(idx: int, tool: Tool) -> TranslatedSchema:
    """The schema of a tool's arguments, which are an object whatever else the schema allows."""
    schema = {name: value for name, value in tool.parameters.items() if name != "nullable"} | {"type": "object"}
    param = f"tools[{idx}].function.parameters"
    return translate_schema(schema, param=param, is_strict=tool.is_strict, tool=tool.name)


@described(type="object", description="A JSON schema.")
def _parameters(value: Any) -> dict[str, Any]:
    """A schema of objects: arguments are never anything else, so null beside the type `object` is left out."""
    if not isinstance(value, dict) or value.get("type") not in (None, "object", ["object"], *OR_NULL):
        raise MismatchError('a JSON schema of type "object"')
    check_utf8(value)
    return {"type": "object"} | value | {"type": "object"}


FUNCTION_FIELDS = table(
    FUNCTION,
    Field("name", _name, is_required=True),
    Field("description", string),
    Field("parameters", _parameters),
    # Whether forced calls must follow all of the schema; those of `auto` are the model's own.
    Field("strict", boolean),
)


@described(**table_schema(FUNCTION_FIELDS))
def _function(value: Any) -> Any:
    """Checked later, where the index of the tool is known."""
    return value


TOOL_FIELDS = table(
    TOOL,
    Field("type", string),
    Field("function", _function, is_required=True),
)


@described(type="array", items=table_schema(TOOL_FIELDS), maxItems=MAX_TOOLS)
def tools(value: Any) -> tuple[Tool, ...]:
    """The functions offered, none of them twice."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise MismatchError(f"a list of at most {MAX_TOOLS} tools")
    found: dict[str, Tool] = {}
    for idx, item in enumerate(value):
        path = f"tools[{idx}]"
        check_kind(_object(item, path), path)
        outer = read_fields(item, TOOL_FIELDS, f"{path}.")
        function = read_fields(_object(outer["function"], f"{path}.function"), FUNCTION_FIELDS, f"{path}.function.")
        name = function["name"]
        if name in found:
            raise InvalidRequest(f"{path}.function.name: there are two functions {shown(name)}", param=path)
        found[name] = Tool(
            name=name,
            description=function.get("description", ""),
            parameters=function.get("parameters", NO_PARAMETERS),
            is_strict=function.get("strict", False),
        )
        if found[name].is_strict:
            _translated(idx, found[name])
    return tuple(found.values())


def check_kind(item: Mapping[str, Any], path: str) -> None:
    """Tools, calls and choices are functions, by default; UnsupportedField names what else is asked for."""
    kind = item.get("type")
    if isinstance(kind, str) and kind not in ("function", ""):
        raise UnsupportedField(
            f'{path}.type must be "function" or absent (this server runs no tools of its own), got {shown(kind)}',
            param=f"{path}.type",
        )


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must be an object, got {shown(value)}", param=path)
    return value


class ToolChoice(NamedTuple):
    """`mode`: none, auto or required. `names`: of the functions that may be called; None: all."""

    mode: str
    names: tuple[str, ...] | None = None
    is_single: bool = False
    """Whether a function is named, which is then called once."""


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
NAMED_FIELDS = (Field("type", string), Field("function", any_object), Field("name", _name))
CHOSEN_FIELDS = (Field("name", _name, is_required=True),)


@described(anyOf=[schema_of(CHOICE_WORDS), table_schema(CHOICE_FIELDS)])
def tool_choice(value: Any) -> ToolChoice:
    """A word, alone or as an object's `type`; a function; or `allowed_tools`, some of the functions."""
    if not isinstance(value, dict):
        try:
            return _word(CHOICE_WORDS(value))
        except MismatchError as mismatch:
            raise MismatchError(f"{mismatch}, or an object that names a function") from None
    found = read_fields(value, CHOICE_FIELDS, "tool_choice.")
    kind = found["type"]
    if kind in ("none", "auto", "required", "any"):
        return _word(kind)
    if kind == "allowed_tools":
        path, allowed = "tool_choice", found
        if "allowed_tools" in found:
            path = "tool_choice.allowed_tools"
            allowed = read_fields(found["allowed_tools"], ALLOWED_FIELDS, f"{path}.")
        names = tuple(_named(tool, f"{path}.tools[{idx}]") for idx, tool in enumerate(allowed.get("tools", ())))
        if not names:
            raise InvalidRequest(f"{path}.tools must name at least one function", param="tool_choice")
        return ToolChoice(_word(allowed.get("mode", "auto")).mode, names)
    if kind == "tool":
        kind = "function"
    return ToolChoice("required", (_named({**value, "type": kind}, "tool_choice"),), is_single=True)


def _word(word: str) -> ToolChoice:
    """`any` is Anthropic's and Mistral's word."""
    return ToolChoice("required" if word == "any" else word)


def _named(value: Mapping[str, Any], path: str) -> str:
    """The name of a function: inside `function`, or beside `type` as OpenAI's Responses and Anthropic have it."""
    check_kind(value, path)
    found = read_fields({key: value[key] for key in value if key in ("function", "name")}, NAMED_FIELDS, f"{path}.")
    if "function" not in found and "name" in found:
        return str(found["name"])
    if "function" not in found:
        raise InvalidRequest(f"{path}.function is required", param=f"{path}.function")
    return str(read_fields(found["function"], CHOSEN_FIELDS, f"{path}.function.")["name"])


TOOL_USE_FIELDS = (
    Field("tools", tools),
    Field("tool_choice", tool_choice),
    Field("parallel_tool_calls", boolean),
)


def wanted_tools(values: Mapping[str, Any]) -> ToolUse | None:
    """What the checked fields of a request come to; None if no tool may be called. Raises InvalidRequest."""
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
    # The model is told of all tools if one of them is named, and of the allowed ones alone if those are listed.
    told = offered if choice.is_single else chosen
    return ToolUse(tools=told, forced=chosen if choice.mode == "required" else (), is_parallel=is_parallel)


@described(type="string", minLength=1, maxLength=MAX_CALLED_NAME)
def _called_name(value: Any) -> str:
    if not 0 < len(string(value)) <= MAX_CALLED_NAME:
        raise MismatchError(f"1 to {MAX_CALLED_NAME} characters")
    return str(value)


@described(type=["string", "object"], description="A JSON object, or one as text; text that is no JSON stays text.")
def _arguments(value: Any) -> dict[str, Any] | str:
    """Chat templates want an object; OpenAI's clients send its JSON text, and models write it with faults."""
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


CALLED_FIELDS = table(CALLED, Field("name", _called_name, is_required=True), Field("arguments", _arguments))


@described(**table_schema(CALLED_FIELDS))
def any_call(value: Any) -> Any:
    """Checked later, where the index of the call is known."""
    return value


CALL_FIELDS = table(
    CALL,
    Field("id", string),
    Field("type", string),
    Field("function", any_call, is_required=True),
)


@described(type="array", items=table_schema(CALL_FIELDS), maxItems=MAX_CALLS)
def any_calls(value: Any) -> Any:
    """Checked later, where the index of the message is known."""
    return value


def read_calls(value: Any, path: str, new_id: str) -> list[dict[str, Any]]:
    """An assistant message's calls, with their arguments as objects, or as text if they are no JSON.

    A call without an id gets one that begins with `new_id`.
    """
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise InvalidRequest(f"{path} must be a list of at most {MAX_CALLS} calls, got {shown(value)}", param=path)
    calls = []
    for idx, item in enumerate(value):
        where = f"{path}[{idx}]"
        check_kind(_object(item, where), where)
        call = read_fields(item, CALL_FIELDS, f"{where}.")
        function = read_fields(_object(call["function"], f"{where}.function"), CALLED_FIELDS, f"{where}.function.")
        function = {"name": function["name"], "arguments": function.get("arguments", {})}
        calls.append({"id": call.get("id") or f"{new_id}_{idx}", "type": "function", "function": function})
    return calls


def objects_for_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with arguments that are text wrapped into objects, for templates that take nothing else."""
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
