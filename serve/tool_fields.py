"""The fields of tool calling: functions offered, which of them must be called, and the calls of earlier turns.

Shapes follow https://platform.openai.com/docs/api-reference/chat. Whether a parameters' schema is any good is found
out when a call is forced, by `runtime/grammar.py`. Knows nothing of HTTP or of how a model writes calls.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.core import Constraint, ConstraintKind, LateCheck
from runtime.errors import InvalidRequest
from runtime.schema_translation import TranslatedSchema, translate_schema
from runtime.tool_formats import Tool, ToolFormat, calls_grammar
from serve.fields import (
    Field,
    MismatchError,
    boolean,
    check_value,
    described,
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
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Tools that a request lets the model call. `forced`: those of which one has to be called; empty: as it likes."""

    tools: tuple[Tool, ...]
    forced: tuple[Tool, ...]
    is_parallel: bool

    def constraint(self, form: ToolFormat) -> Constraint | None:
        """What holds the answer to calls, if it has to be calls."""
        if not self.forced:
            return None
        tools, checks = self._compilable(self.forced)
        source = calls_grammar(form, tools, is_parallel=self.is_parallel)
        return Constraint(ConstraintKind.GRAMMAR, source, "tools", late_checks=checks)

    def _compilable(self, tools: Sequence[Tool]) -> tuple[list[Tool], tuple[LateCheck, ...]]:
        """The tools with what of their parameters a grammar can hold, and the checks for the rest."""
        translated = [_translated(self.tools.index(tool), tool) for tool in tools]
        checks = tuple(check for found in translated for check in found.late_checks)
        return [replace(tool, compiled=found.source) for tool, found in zip(tools, translated, strict=True)], checks


@described(type="string", pattern=f"^{NAME.pattern}$")
def _name(value: Any) -> str:
    if not NAME.fullmatch(string(value)):
        raise MismatchError("1 to 64 letters, digits, underscores, dots and dashes")
    return str(value)


def _translated(idx: int, tool: Tool) -> TranslatedSchema:
    """The schema of a tool's arguments, which are an object whatever else the schema allows."""
    schema = {name: value for name, value in tool.parameters.items() if name != "nullable"} | {"type": "object"}
    param = f"tools[{idx}].function.parameters"
    return translate_schema(schema, param=param, is_strict=tool.is_strict, tool=tool.name)


@described(type="object", description="A JSON schema of an object.")
def _parameters(value: Any) -> dict[str, Any]:
    kinds = (value.get("type") or "object") if isinstance(value, dict) else None
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise MismatchError('a JSON schema of type "object"')
    return {"type": "object", **value}


FUNCTION_FIELDS = (
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


TOOL_FIELDS = (
    Field("type", one_of("function"), is_required=True),
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
        outer = read_fields(_object(item, path), TOOL_FIELDS, f"{path}.")
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


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must be an object, got {shown(value)}", param=path)
    return value


CHOSEN_FIELDS = (Field("name", _name, is_required=True),)


@described(**table_schema(CHOSEN_FIELDS))
def _chosen(value: Any) -> Any:
    """Checked later, with the path of its name."""
    return value


CHOICE_FIELDS = (
    Field("type", one_of("function"), is_required=True),
    Field("function", _chosen, is_required=True),
)
CHOICE_WORDS = one_of("none", "auto", "required")


@described(anyOf=[schema_of(CHOICE_WORDS), table_schema(CHOICE_FIELDS)])
def tool_choice(value: Any) -> str | tuple[str]:
    """One of the three words, or the name of a function in a tuple."""
    if not isinstance(value, dict):
        try:
            return str(CHOICE_WORDS(value))
        except MismatchError as mismatch:
            raise MismatchError(f"{mismatch}, or an object that names a function") from None
    outer = read_fields(value, CHOICE_FIELDS, "tool_choice.")
    path = "tool_choice.function"
    return (read_fields(_object(outer["function"], path), CHOSEN_FIELDS, f"{path}.")["name"],)


TOOL_USE_FIELDS = (
    Field("tools", tools),
    Field("tool_choice", tool_choice),
    Field("parallel_tool_calls", boolean),
)


def wanted_tools(values: Mapping[str, Any]) -> ToolUse | None:
    """What the checked fields of a request come to; None if no tool may be called. Raises InvalidRequest."""
    offered: tuple[Tool, ...] = values.get("tools", ())
    choice = values.get("tool_choice", "auto")
    if not offered:
        if choice not in ("none", "auto"):
            raise InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")
        return None
    if choice == "none":
        return None
    forced: tuple[Tool, ...] = offered if choice == "required" else ()
    if isinstance(choice, tuple):
        forced = tuple(tool for tool in offered if tool.name in choice)
        if not forced:
            names = ", ".join(tool.name for tool in offered)
            raise InvalidRequest(f"tool_choice names {shown(choice[0])}, the tools are {names}", param="tool_choice")
    # A named function is called once, as at OpenAI.
    is_parallel = values.get("parallel_tool_calls", True) and not isinstance(choice, tuple)
    return ToolUse(tools=offered, forced=forced, is_parallel=is_parallel)


@described(type="string", description="A JSON object, as text.")
def _arguments(value: Any) -> dict[str, Any]:
    """Chat templates want an object; OpenAI's clients send its JSON text."""
    try:
        parsed = json.loads(string(value))
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise MismatchError("a JSON object, as text")
    return parsed


CALLED_FIELDS = (Field("name", _name, is_required=True), Field("arguments", _arguments, is_required=True))


@described(**table_schema(CALLED_FIELDS))
def _called(value: Any) -> Any:
    """Checked later, where the index of the call is known."""
    return value


@described(description="What a stream's deltas have; not looked at.")
def _anything(value: Any) -> Any:
    return value


CALL_FIELDS = (
    Field("id", string, is_required=True),
    Field("type", one_of("function"), is_required=True),
    Field("function", _called, is_required=True),
    Field("index", _anything),
)


@described(type="array", items=table_schema(CALL_FIELDS), maxItems=MAX_CALLS)
def any_calls(value: Any) -> Any:
    """Checked later, where the index of the message is known."""
    return value


def read_calls(value: Any, path: str) -> list[dict[str, Any]]:
    """An assistant message's calls, with their arguments as objects."""
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise InvalidRequest(f"{path} must be a list of at most {MAX_CALLS} calls, got {shown(value)}", param=path)
    calls = []
    for idx, item in enumerate(value):
        where = f"{path}[{idx}]"
        call = read_fields(_object(item, where), CALL_FIELDS, f"{where}.")
        function = read_fields(_object(call["function"], f"{where}.function"), CALLED_FIELDS, f"{where}.function.")
        calls.append({"id": call["id"], "type": "function", "function": function})
    return calls


def read_call_id(value: Any, path: str) -> str:
    """A tool message says which call it answers."""
    if value is None:
        raise InvalidRequest(f"{path} is required in a message of the role tool", param=path)
    return str(check_value(value, string, path))
